//! Workers as real processes: how they end, and that they leave nothing behind.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use grlm::{
    events::human_duration,
    executor::{AttemptEnd, AttemptSpec, Launch, Launcher, Stop, stop_channel},
};
use grlm_stages::Failure;
use serde_json::json;

use crate::environment::{Running, wait_until};

struct Attempt {
    folder: tempfile::TempDir,
    spec: AttemptSpec,
    timeout: Option<Duration>,
    grace: Duration,
    held: Option<File>,
    /// Ask for this once the file `ready` exists in the folder.
    stop: Option<Stop>,
}

impl Attempt {
    fn command(run: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let spec = AttemptSpec::new("stage", "command", json!({ "run": run }), path, &path.join("scratch"));
        Self { folder, spec, timeout: None, grace: Launch::GRACE, held: None, stop: None }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }

    fn run(&self) -> AttemptEnd {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (sender, receiver) = stop_channel();
        let log = self.log();
        let launch = Launch {
            spec: &self.spec,
            folder: self.folder.path(),
            log: &log,
            timeout: self.timeout,
            grace: self.grace,
            held: self.held.as_ref(),
        };
        runtime.block_on(async {
            let stopper = async {
                if let Some(stop) = self.stop {
                    let start = Instant::now();
                    while !self.folder.path().join("ready").exists() {
                        assert!(start.elapsed() < Duration::from_secs(60), "the program never began");
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    sender.ask(stop);
                }
                std::future::pending::<()>().await;
            };
            let mut ignore = |_| {};
            let launcher = Launcher::with_program(env!("CARGO_BIN_EXE_grlm"));
            tokio::select! {
                end = launcher.run(&launch, receiver, &mut ignore) => end.unwrap(),
                () = stopper => unreachable!(),
            }
        })
    }

    fn failure(&self) -> Option<Failure> {
        self.run().result.err().map(|e| e.failure)
    }
}

/// Whether the process of this number is there and no zombie.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

#[test]
fn a_command_runs_in_its_folder_with_a_clean_environment() {
    let mut attempt = Attempt::command("pwd > where; env > env; echo hello; echo woe >&2");
    attempt.spec.env.insert("SEED".into(), "7".into());
    let end = attempt.run();
    assert_eq!(end.result, Ok(()));
    assert!(end.peak_memory > 1 << 20);
    assert_eq!(Path::new(attempt.text("where").trim()), attempt.folder.path().canonicalize().unwrap());
    let env = attempt.text("env");
    assert!(env.contains("SEED=7\n") && env.contains("OMP_NUM_THREADS=1\n") && env.contains("CUDA_VISIBLE_DEVICES=\n"));
    assert!(!env.contains("CARGO_"), "{env}");
    assert_eq!(attempt.text("log"), "hello\nwoe\n");
}

#[test]
fn failures_are_told_apart() {
    let command = Attempt::command("echo what went wrong >&2; exit 3").run().result.unwrap_err();
    assert_eq!(command.failure, Failure::Command);
    assert_eq!(command.message, "the command ended with status 3");
    assert_eq!(command.tail, ["what went wrong"]);
    assert_eq!(Attempt::command("kill -9 $$").failure(), Some(Failure::Killed));
    assert_eq!(Attempt::command("sh -c 'kill -9 $$'; exit $?").failure(), Some(Failure::Killed));
    assert_eq!(Attempt::command("kill -9 $PPID").failure(), Some(Failure::Killed));
    assert_eq!(Attempt::command("kill -ABRT $PPID").failure(), Some(Failure::Bug));
    let memory = "echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 1";
    assert_eq!(Attempt::command(memory).failure(), Some(Failure::OutOfMemory));
    let mut unknown = Attempt::command("");
    unknown.spec.kind = "nonesuch".into();
    assert_eq!(unknown.failure(), Some(Failure::Bug));
}

#[test]
fn a_timeout_ends_the_whole_group_even_if_it_ignores_sigterm() {
    let mut timeout = Duration::from_millis(300);
    // Where that is over before the program has begun, more is tried.
    let attempt = loop {
        let mut attempt =
            Attempt::command("trap '' TERM; sleep 1000 & echo $! > child; echo $$ > own; wait; sleep 1000");
        attempt.timeout = Some(timeout);
        attempt.grace = Duration::from_millis(100);
        let failure = attempt.run().result.unwrap_err();
        assert_eq!(failure.failure, Failure::Timeout);
        assert_eq!(failure.message, format!("ran longer than its timeout of {}", human_duration(timeout)));
        if !attempt.text("own").is_empty() {
            break attempt;
        }
        assert!(timeout < Duration::from_secs(10), "the program never began");
        timeout *= 10;
    };
    for name in ["child", "own"] {
        let pid = attempt.text(name);
        wait_until("the group is gone", || !is_alive(&pid));
    }
}

#[test]
fn a_stop_reaches_the_program_which_may_save() {
    let mut attempt =
        Attempt::command("trap 'echo saved > saved; exit 1' TERM; touch ready; while :; do sleep 0.01; done");
    attempt.stop = Some(Stop::Save);
    assert_eq!(attempt.failure(), Some(Failure::Stopped));
    assert_eq!(attempt.text("saved"), "saved\n");
}

#[test]
fn a_second_stop_does_not_wait() {
    let mut attempt = Attempt::command("trap '' TERM; touch ready; while :; do sleep 0.01; done");
    attempt.stop = Some(Stop::Now);
    assert_eq!(attempt.failure(), Some(Failure::Stopped));
}

#[test]
fn what_a_command_left_running_ends_with_it() {
    let sleeper = "sh -c 'echo $$ > pid.new; mv pid.new pid; exec sleep 1000'";
    for background in [format!("{sleeper} &"), format!("(setsid {sleeper} &);")] {
        let attempt = Attempt::command(&format!("{background} while ! [ -e pid ]; do sleep 0.01; done"));
        assert_eq!(attempt.run().result, Ok(()), "{background}");
        let pid = attempt.text("pid");
        assert!(!pid.is_empty());
        wait_until("the background process is gone", || !is_alive(&pid));
    }
}

#[test]
fn secrets_are_blanked_in_the_log_also_in_pieces() {
    let mut attempt = Attempt::command(
        "printf 'token=%s\\n' \"$GRLM_TEST_SECRET\"; printf hunter2-; sleep 0.05; printf 'and-more end'; echo; exit 4",
    );
    attempt.spec.secrets.push("GRLM_TEST_SECRET".into());
    // SAFETY: the only place where this test binary changes its environment, and before any thread of ours reads it.
    unsafe { std::env::set_var("GRLM_TEST_SECRET", "hunter2-and-more") };
    let failure = attempt.run().result.unwrap_err();
    assert_eq!(attempt.text("log"), "token=***\n*** end\n");
    assert_eq!(failure.tail, ["token=***", "*** end"]);
    assert!(!attempt.text("attempt.json").contains("hunter2-and-more"));
}

/// Not a test of its own: the process that `kill_minus_nine_of_the_parent_takes_everything_with_it` kills.
#[test]
fn acts_as_parent() {
    let Ok(folder) = std::env::var("GRLM_TEST_PARENT") else { return };
    let run = format!(
        "cd {folder}; sleep 1000 & echo $! > child; echo $$ > own; echo $PPID > worker; ls -l /proc/$$/fd > own-open; \
         ls -l /proc/$PPID/fd > worker-open; touch ready; wait"
    );
    let mut attempt = Attempt::command(&run);
    let lease = File::create(Path::new(&folder).join("lease")).unwrap();
    lease.lock().unwrap();
    attempt.held = Some(lease);
    attempt.run();
}

#[test]
fn kill_minus_nine_of_the_parent_takes_everything_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["worker::acts_as_parent", "--exact"]).env("GRLM_TEST_PARENT", folder.path()).stdout(Stdio::null());
    let mut parent = Running::start(&mut command);
    wait_until("the worker is ready", || folder.path().join("ready").exists());
    let pids = ["worker", "own", "child"].map(read);
    assert!(pids.iter().all(|pid| is_alive(pid)));
    let has_lease = |open: &str| read(open).lines().any(|line| line.ends_with("/lease"));
    assert!(has_lease("worker-open") && !has_lease("own-open"), "{}{}", read("worker-open"), read("own-open"));
    let lease = File::open(folder.path().join("lease")).unwrap();
    assert!(lease.try_lock().is_err(), "the parent has it");
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_until("the lease is free", || lease.try_lock().is_ok());
    assert!(!is_alive(&pids[1]) && !is_alive(&pids[2]), "what may use a device is gone before the lease is free");
    wait_until("the worker is gone", || !is_alive(&pids[0]));
}
