//! Running `llamafactory-cli`: its output becomes the stage's log, its `trainer_log.jsonl` the progress.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use super::progress::Watch;
use crate::{StageContext, StageError, train::params::Params};

/// Time between two looks at the log of progress.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Time that the program has to end after it was asked to.
const GRACE: Duration = Duration::from_secs(20);
/// Lines of output that are kept for the message of a failure.
const TAIL: usize = 40;

/// Runs `llamafactory-cli VERB ARGUMENTS` to its end, while the log of its progress is watched, if it writes one.
///
/// # Errors
/// It cannot be started, or fails; out of memory is told apart. A loss is not finite. A stop was asked for.
pub fn run(
    params: &Params,
    verb: &str,
    arguments: &Path,
    mut watch: Option<Watch>,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let program = &params.llamafactory.command;
    let mut child = start(params, verb, arguments, cx)?;
    let (sender, lines) = mpsc::channel();
    read_lines(child.stdout.take(), false, sender.clone());
    read_lines(child.stderr.take(), true, sender);
    let mut heard = Heard::default();
    let mut looked = Instant::now();
    loop {
        match lines.recv_timeout(LOOK_EVERY) {
            Ok((is_error, line)) => heard.take(is_error, line, cx),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            if let Err(error) = look(watch.as_mut(), cx) {
                end(&mut child);
                return Err(error);
            }
        }
    }
    let status = child.wait().map_err(|e| StageError::io("wait for", program.as_str(), e))?;
    // A loss that is not finite may be why it failed.
    look(watch.as_mut(), cx)?;
    match status.success() {
        true => Ok(()),
        false => Err(heard.failure(&format!("{program} {verb}"), status)),
    }
}

fn start(params: &Params, verb: &str, arguments: &Path, cx: &StageContext) -> Result<Child, StageError> {
    let program = &params.llamafactory.command;
    let mut command = Command::new(program);
    command.arg(verb).arg(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("PYTHONUNBUFFERED", "1").env("DISABLE_VERSION_CHECK", "1").env("WANDB_DISABLED", "true");
    command.env("OMP_NUM_THREADS", cx.threads().to_string());
    if verb == "train" && (cx.devices().len() > 1 || params.llamafactory.deepspeed.is_on()) {
        command.env("FORCE_TORCHRUN", "1");
    }
    // The program stays in the worker's process group: what ends the worker ends it, and all that it starts.
    command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => StageError::params(format!("`{program}` is not installed"))
            .help("`pip install llamafactory`, or set `llamafactory.command` to where it is"),
        _ => StageError::io("start", program.as_str(), e),
    })
}

/// Passes progress on.
fn look(watch: Option<&mut Watch>, cx: &mut StageContext) -> Result<(), StageError> {
    if let Some((step, steps)) = watch.map(Watch::look).transpose()?.flatten() {
        cx.progress(step, steps, "step");
    }
    cx.check_stop()
}

/// What the program said, as far as the message of a failure needs it.
#[derive(Default)]
struct Heard {
    /// The last lines.
    tail: Vec<String>,
    /// The very last one that was an error's.
    complaint: Option<String>,
}

impl Heard {
    fn take(&mut self, is_error: bool, line: String, cx: &mut StageContext) {
        cx.info(line.clone());
        if is_error {
            self.complaint = Some(line.clone());
        }
        self.tail.push(line);
        if self.tail.len() > TAIL {
            self.tail.remove(0);
        }
    }

    fn failure(self, program: &str, status: ExitStatus) -> StageError {
        let last = self.complaint.or_else(|| self.tail.last().cloned()).unwrap_or_default();
        if self.tail.iter().any(|line| line.contains("CUDA out of memory") || line.contains("OutOfMemoryError")) {
            return StageError::OutOfMemory {
                message: format!("{program}: {last}"),
                help: Some(
                    "a smaller `batch` with more `accumulation`, `gradient_checkpointing: true` or ZeRO-3".into(),
                ),
            };
        }
        StageError::Command {
            message: format!("{program} failed ({status}): {last}"),
            help: Some("its whole output is in the stage's log".into()),
        }
    }
}

/// Sends every line of a stream that is not empty, and whether it is the one for errors.
fn read_lines(stream: Option<impl Read + Send + 'static>, is_error: bool, sender: Sender<(bool, String)>) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut bytes = Vec::new();
        // Progress bars end their lines by a carriage return: only what is left at the end of a line is shown.
        while matches!(reader.read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&bytes);
            let shown = text.trim_end().rsplit('\r').next().unwrap_or_default();
            if !shown.trim().is_empty() && sender.send((is_error, shown.to_owned())).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}

/// Asks the program to end, which it hands on to what it started, and ends it.
fn end(child: &mut Child) {
    // SAFETY: `kill` has no memory effects; the child was not waited for yet, so the number is its own.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}
