//! Starting a worker on this machine and watching it to its end.
//!
//! Workers must be started from a thread that lives as long as the program does (the main one): the kernel ties the
//! parent-death signal to the thread that spawned. The engine's runtime is single-threaded on it, so that holds.

use std::{
    collections::BTreeSet,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{net, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use grlm_stages::WorkerEvent;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
};

use crate::device::sampler::Sampler;

use super::{
    AttemptEnd, AttemptSpec, Redactor, Stop, StopReceiver,
    environment::{environment, redactor},
    outcome::{Asked, Evidence, tail},
    process::{self, Exit, Usage},
    redact::RedactedStream,
    worker::Message,
};

/// Lines of the log that go with a failure.
const TAIL_LINES: usize = 10;
/// Longer lines from a worker are dropped: a defect, or not a worker of ours.
const LONGEST_LINE: usize = 4 << 20;
/// How long to wait for killed members of the group to be gone.
const GROUP_GONE: Duration = Duration::from_millis(100);

/// Starts workers.
#[derive(Debug, Clone)]
pub struct Launcher {
    program: PathBuf,
}

/// One attempt to launch.
#[derive(Debug)]
pub struct Launch<'a> {
    pub spec: &'a AttemptSpec,
    /// An existing folder; `attempt.json` is written here.
    pub folder: &'a Path,
    /// What the worker and all that it starts print; appended to.
    pub log: &'a Path,
    /// From start to SIGTERM.
    pub timeout: Option<Duration>,
    /// From SIGTERM to SIGKILL.
    pub grace: Duration,
    /// The worker keeps a copy of it open until it is gone, and what it starts gets none: a lock on it lasts as long, also
    /// when this process is killed.
    pub held: Option<&'a File>,
}

impl Launch<'_> {
    /// Time to write a checkpoint of a large model.
    pub const GRACE: Duration = Duration::from_secs(30);
}

/// The attempt could not be started, or was lost sight of.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}{}", path.as_ref().map(|p| format!(" {}", p.display())).unwrap_or_default())]
pub struct LaunchError {
    pub action: &'static str,
    pub path: Option<PathBuf>,
    pub source: io::Error,
}

impl LaunchError {
    fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { action, path: Some(path.to_owned()), source }
    }

    fn new(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { action, path: None, source }
    }
}

impl Launcher {
    /// Workers are this very program, also when its file was replaced meanwhile.
    pub fn this_program() -> Self {
        Self { program: PathBuf::from("/proc/self/exe") }
    }

    /// Workers are another copy of grlm.
    pub fn with_program(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into() }
    }

    /// Runs one attempt to its end, passing on the worker's events; its last one is part of the result instead.
    /// Dropping the future kills the attempt.
    ///
    /// # Errors
    /// If the worker cannot be started. A stage that fails is no error here: see [`AttemptEnd::result`].
    pub async fn run(
        &self,
        launch: &Launch<'_>,
        mut stop: StopReceiver,
        on_event: &mut dyn FnMut(WorkerEvent),
    ) -> Result<AttemptEnd, LaunchError> {
        let redactor = redactor(launch.spec);
        let oom_kills = process::kernel_oom_kills();
        let started = Instant::now();
        let (mut worker, mut channel, mut output) = self.start(launch, &redactor)?;
        let watched = !launch.spec.visible_devices.is_empty();
        let group = worker.pid.as_raw_nonzero().get().unsigned_abs();
        let sampler = watched.then(|| Sampler::start(launch.spec.visible_devices.clone(), group));
        let mut lines = Lines {
            redactor: &redactor,
            buffer: Vec::with_capacity(512),
            last: None,
            peak_memory: None,
            rows: BTreeSet::new(),
        };

        let mut asked = Asked::Nothing;
        let mut next_step = launch.timeout.map(|timeout| (started + timeout, Stop::Save));
        let mut channel_open = true;
        loop {
            let step = async {
                match next_step {
                    Some((at, _)) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let wanted = tokio::select! {
                biased;
                read = channel.read_buf(&mut lines.buffer), if channel_open => {
                    channel_open = read.is_ok_and(|n| n > 0);
                    lines.take(on_event);
                    continue;
                }
                () = output.pump() => continue,
                _ = worker.pidfd.readable() => break,
                Ok(()) = stop.changed() => {
                    let wanted = *stop.borrow_and_update();
                    asked = if asked == Asked::Nothing { Asked::Stopped } else { asked };
                    wanted
                }
                () = step => {
                    let wanted = next_step.map_or(Stop::No, |(_, wanted)| wanted);
                    if asked == Asked::Nothing {
                        asked = Asked::TimedOut(launch.timeout.unwrap_or_default());
                    }
                    wanted
                }
            };
            next_step = worker.ask(wanted, launch.grace).or(next_step.filter(|_| wanted == Stop::No));
        }

        let (exit, usage) = worker.end().await.map_err(LaunchError::new("wait for the worker"))?;
        while let Ok(n) = channel.try_read_buf(&mut lines.buffer) {
            lines.take(on_event);
            if n == 0 {
                break;
            }
        }
        output.finish();
        let tail = tail(launch.log, TAIL_LINES);
        let evidence = Evidence {
            asked,
            exit,
            last: lines.last.as_ref(),
            tail: &tail,
            kernel_out_of_memory: oom_kills < process::kernel_oom_kills(),
        };
        Ok(AttemptEnd {
            result: evidence.judge(),
            duration: started.elapsed(),
            peak_memory: lines.peak_memory.unwrap_or(usage.peak_memory),
            rows: lines.rows,
            peak_gpu_memory: sampler.as_ref().and_then(Sampler::peak),
            cpu_time: usage.cpu_time,
        })
    }

    fn start<'r>(
        &self,
        launch: &Launch<'_>,
        redactor: &'r Redactor,
    ) -> Result<(Worker, UnixStream, Output<'r>), LaunchError> {
        let spec = launch.spec;
        spec.write(launch.folder).map_err(LaunchError::at("write into", launch.folder))?;
        let log = OpenOptions::new().create(true).append(true).open(launch.log);
        let log = log.map_err(LaunchError::at("open the log", launch.log))?;
        let refused = || LaunchError::new("open a channel to the worker");
        let (ours, theirs) = net::UnixStream::pair().map_err(refused())?;
        ours.set_nonblocking(true).map_err(refused())?;
        let (output, target) = Output::new(log, redactor).map_err(refused())?;
        let held = launch.held.map(File::try_clone).transpose().map_err(refused())?;

        let child = Command::new(&self.program)
            .arg0("grlm")
            .arg("__worker")
            .arg(launch.folder)
            .args(["--parent", &std::process::id().to_string()])
            .current_dir(&spec.directory)
            .env_clear()
            .envs(environment(spec, std::env::vars_os()))
            .process_group(0)
            .stdin(OwnedFd::from(theirs))
            .stdout(held.map_or_else(Stdio::null, Stdio::from))
            .stderr(target)
            .spawn()
            .map_err(LaunchError::at("start a worker in", &spec.directory))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| refused()(io::ErrorKind::InvalidData.into()))?;
        let worker = Worker::watch(pid).map_err(LaunchError::new("watch the worker"))?;
        Ok((worker, UnixStream::from_std(ours).map_err(refused())?, output))
    }
}

/// A running worker and its process group; killed when dropped.
struct Worker {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    waited: bool,
}

impl Worker {
    fn watch(pid: Pid) -> io::Result<Self> {
        let watched =
            rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(io::Error::from).and_then(|pidfd| {
                // SAFETY: the `AsyncFd` owns the descriptor, which stays open and the same until it is dropped.
                unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)
            });
        match watched {
            Ok(pidfd) => Ok(Self { pid, pidfd, waited: false }),
            Err(error) => {
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                let _ = process::wait_with_usage(pid);
                Err(error)
            }
        }
    }

    /// Sends the signal for this step to the whole group; returns the step to take if that does not help.
    fn ask(&self, stop: Stop, grace: Duration) -> Option<(Instant, Stop)> {
        let signal = match stop {
            Stop::No => return None,
            Stop::Save => Signal::TERM,
            Stop::Now => Signal::KILL,
        };
        // The worker is not waited for yet, so its number cannot have gone to another process.
        let _ = rustix::process::kill_process_group(self.pid, signal);
        (stop == Stop::Save).then(|| (Instant::now() + grace, Stop::Now))
    }

    /// After the worker ended: kills what is left of its group, and takes its status.
    async fn end(&mut self) -> io::Result<(Exit, Usage)> {
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        self.waited = true;
        let ended = process::wait_with_usage(self.pid)?;
        let patience = Instant::now() + GROUP_GONE;
        while rustix::process::test_kill_process_group(self.pid).is_ok() && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(ended)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.waited {
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
            let _ = process::wait_with_usage(self.pid);
        }
    }
}

/// The worker's messages.
struct Lines<'r> {
    redactor: &'r Redactor,
    buffer: Vec<u8>,
    last: Option<WorkerEvent>,
    peak_memory: Option<u64>,
    rows: BTreeSet<String>,
}

impl Lines<'_> {
    fn take(&mut self, on_event: &mut dyn FnMut(WorkerEvent)) {
        let Some(end) = self.buffer.iter().rposition(|b| *b == b'\n') else {
            if self.buffer.len() > LONGEST_LINE {
                self.buffer.clear();
            }
            return;
        };
        let rest = self.buffer.split_off(end + 1);
        let whole = std::mem::replace(&mut self.buffer, rest);
        for line in whole.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(Message::Usage { peak_memory, rows }) => (self.peak_memory, self.rows) = (Some(peak_memory), rows),
                Ok(Message::Event(mut event)) => {
                    self.blank(&mut event);
                    match event {
                        WorkerEvent::Finished | WorkerEvent::Failed { .. } => self.last = Some(event),
                        event => on_event(event),
                    }
                }
                Err(error) => tracing::warn!(%error, "a worker sent something that is no event"),
            }
        }
    }

    fn blank(&self, event: &mut WorkerEvent) {
        if self.redactor.is_empty() {
            return;
        }
        match event {
            WorkerEvent::Progress { unit: text, .. }
            | WorkerEvent::Metric { name: text, .. }
            | WorkerEvent::Log { message: text, .. } => *text = self.redactor.text(text),
            WorkerEvent::Failed { message, help, .. } => {
                *message = self.redactor.text(message);
                *help = help.as_deref().map(|h| self.redactor.text(h));
            }
            WorkerEvent::Finished => {}
        }
    }
}

/// Where the worker's output goes: straight into the log, or through a pipe when there are secrets to blank.
enum Output<'r> {
    Direct,
    Filtered { pipe: Option<pipe::Receiver>, stream: RedactedStream<'r>, log: File, chunk: Vec<u8> },
}

impl<'r> Output<'r> {
    fn new(log: File, redactor: &'r Redactor) -> io::Result<(Self, OwnedFd)> {
        if redactor.is_empty() {
            return Ok((Self::Direct, log.into()));
        }
        let (reader, writer) = io::pipe()?;
        let pipe = Some(pipe::Receiver::from_owned_fd(reader.into())?);
        Ok((Self::Filtered { pipe, stream: redactor.stream(), log, chunk: Vec::with_capacity(1 << 16) }, writer.into()))
    }

    /// Passes on one piece; pends for ever once there is nothing more to come.
    async fn pump(&mut self) {
        let Self::Filtered { pipe: slot @ Some(_), stream, log, chunk } = self else {
            return std::future::pending().await;
        };
        let Some(pipe) = slot else { return };
        match pipe.read_buf(chunk).await {
            Ok(n) if n > 0 => pass_on(chunk, stream, log),
            _ => *slot = None,
        }
    }

    /// Passes on what is left after the worker ended.
    fn finish(&mut self) {
        let Self::Filtered { pipe, stream, log, chunk } = self else { return };
        if let Some(pipe) = pipe {
            while pipe.try_read_buf(chunk).is_ok_and(|n| n > 0) {
                pass_on(chunk, stream, log);
            }
        }
        let mut out = Vec::new();
        stream.finish(&mut out);
        let _ = log.write_all(&out);
    }
}

/// A log that cannot be written (a full disk) must not fail the stage.
fn pass_on(chunk: &mut Vec<u8>, stream: &mut RedactedStream<'_>, log: &mut File) {
    let mut out = Vec::with_capacity(chunk.len());
    stream.push(chunk, &mut out);
    chunk.clear();
    let _ = log.write_all(&out);
}
