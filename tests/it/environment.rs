//! A folder of its own for each test, and `grlm` run in it with nothing of the caller's environment.

use std::{
    fs,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// A working folder with a `journal` that stages write a line to each time they really run.
pub struct Environment {
    root: TempDir,
}

/// What one call of `grlm` did.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A program that goes on beside the test, and is killed when dropped: what a failed test left behind would hold its
/// output open, and whoever reads that would wait.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("it starts"))
    }
}

impl Deref for Running {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks again and again for a minute, far longer than anything takes on a machine with other work.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "still waiting: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

impl Environment {
    pub fn new() -> Self {
        Self { root: tempfile::tempdir().expect("a temporary folder") }
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.path().join(relative)
    }

    pub fn write(&self, relative: &str, text: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().expect("has a parent")).expect("folder");
        fs::write(path, text).expect("written");
    }

    pub fn read(&self, relative: &str) -> String {
        fs::read_to_string(self.path(relative)).unwrap_or_else(|e| panic!("{relative}: {e}"))
    }

    /// `grlm` with these arguments, not yet started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_grlm"));
        command
            .args(arguments)
            .current_dir(self.root.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.root.path())
            .env("GRLM_LEASES", self.root.path().join("leases"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    pub fn grlm(&self, arguments: &[&str]) -> Outcome {
        Outcome::from(self.command(arguments).output().expect("grlm starts"))
    }

    /// Runs, and expects success.
    pub fn ok(&self, arguments: &[&str]) -> Outcome {
        let outcome = self.grlm(arguments);
        assert_eq!(outcome.code, 0, "grlm {arguments:?}\n{}\n{}", outcome.stdout, outcome.stderr);
        outcome
    }

    /// Runs, and expects this exit code; returns what was said on stderr.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let outcome = self.grlm(arguments);
        assert_eq!(outcome.code, code, "grlm {arguments:?}\n{}\n{}", outcome.stdout, outcome.stderr);
        outcome.stderr
    }

    /// Runs `pipeline`; returns how many rows `stage` computed, and `None` if it did not run.
    pub fn computed(&self, pipeline: &str, stage: &str) -> Option<u64> {
        let outcome = self.ok(&["run", pipeline, "--message-format", "json"]);
        let mut events = outcome.stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event"));
        let event = events
            .find(|event| event["kind"] == "metric" && event["stage"] == stage && event["name"] == "rows.computed")?;
        event["value"].as_f64().map(|rows| rows as u64)
    }

    /// The stages that ran since the last call, sorted; empties the journal.
    pub fn ran(&self) -> Vec<String> {
        let path = self.path("journal");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        let mut names: Vec<String> = text.lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// All files below a folder with their content, sorted by path.
    pub fn tree(&self, relative: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        collect(&self.path(relative), &mut files);
        files.sort();
        files
    }
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            let content = fs::read(&path).expect("readable");
            files.push((path, content));
        }
    }
}

/// What was said, with the line breaks that fit it to a terminal taken out.
pub fn unwrapped(said: &str) -> String {
    said.replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// `src.txt` → `upper` → `count`, and `other` beside them; each writes its name to the journal when it runs.
pub const THREE: &str = r#"
name: three
vars: { source: src.txt }
stages:
  upper:
    uses: command
    inputs: { text: { file: "${vars.source}" } }
    with: { run: "echo upper >> journal; tr a-z A-Z < ${inputs.text} > ${outputs.out}" }
    outputs: { out: upper.txt }
  count:
    uses: command
    inputs: { text: upper.out }
    with: { run: "echo count >> journal; wc -c < ${inputs.text} > ${outputs.out}" }
    outputs: { out: count.txt }
  other:
    uses: command
    inputs: { text: { file: "${vars.source}" } }
    with: { run: "echo other >> journal; cat ${inputs.text} > ${outputs.out}" }
    outputs: { out: other.txt }
"#;

/// An environment that holds [`THREE`] as `three.yaml` and its source.
pub fn three() -> Environment {
    let env = Environment::new();
    env.write("three.yaml", THREE);
    env.write("src.txt", "hello\n");
    env
}
