//! How an attempt ended, and telling the reasons apart. Pure: the launcher collects the evidence.

use std::{collections::BTreeSet, io::Read, io::Seek, path::Path, time::Duration};

use grlm_stages::{Failure, WorkerEvent};

use super::{process::Exit, report::is_reported};

/// The end of an attempt.
#[derive(Debug, Clone)]
pub struct AttemptEnd {
    pub result: Result<(), AttemptFailure>,
    pub duration: Duration,
    /// The largest resident set of the worker or one of its children, in bytes.
    pub peak_memory: u64,
    /// The most that they held on one leased GPU, in bytes; `None` if that was not seen.
    pub peak_gpu_memory: Option<u64>,
    /// Namespaces of rows that it used.
    pub rows: BTreeSet<String>,
    /// Processor time of the worker and its children.
    pub cpu_time: Duration,
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptFailure {
    pub failure: Failure,
    pub message: String,
    pub help: Option<String>,
    /// The last lines of its log.
    pub tail: Vec<String>,
}

/// What the launcher asked of the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Nothing,
    TimedOut(Duration),
    Stopped,
}

/// Everything that tells why a worker ended.
#[derive(Debug)]
pub struct Evidence<'a> {
    pub asked: Asked,
    pub exit: Exit,
    /// The worker's last word, if it had one.
    pub last: Option<&'a WorkerEvent>,
    pub tail: &'a [String],
    /// The kernel ended some process for want of memory meanwhile.
    pub kernel_out_of_memory: bool,
}

/// Texts by which programs say that memory ran out.
const OUT_OF_MEMORY_TEXTS: &[&str] = &[
    "CUDA out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "OutOfMemoryError",
    "MemoryError",
    "std::bad_alloc",
    "Cannot allocate memory",
    "memory allocation of ",
];

impl Evidence<'_> {
    /// # Errors
    /// The failure, told apart.
    pub fn judge(&self) -> Result<(), AttemptFailure> {
        if self.exit == Exit::Code(0) && matches!(self.last, Some(WorkerEvent::Finished)) {
            return Ok(());
        }
        Err(match self.asked {
            Asked::TimedOut(limit) => self.failure(
                Failure::Timeout,
                format!("ran longer than its timeout of {}", crate::events::human_duration(limit)),
                Some("raise `timeout:` of the stage, or leave it out"),
            ),
            Asked::Stopped => self.failure(Failure::Stopped, "stopped on request".into(), None),
            Asked::Nothing => match self.last {
                Some(WorkerEvent::Failed { failure, message, help }) => {
                    let mut end = self.failure(*failure, message.clone(), help.as_deref());
                    let may_be_memory = !matches!(failure, Failure::WrongInput | Failure::Stopped);
                    if may_be_memory && self.says_out_of_memory(message) {
                        end.failure = Failure::OutOfMemory;
                    }
                    end
                }
                _ => self.crash(),
            },
        })
    }

    /// The worker ended without a last word.
    fn crash(&self) -> AttemptFailure {
        if self.says_out_of_memory("") {
            return self.failure(
                Failure::OutOfMemory,
                format!("out of memory: the worker {}", describe(self.exit)),
                Some("give the stage more memory, or smaller batches"),
            );
        }
        let message = format!("the worker {}", describe(self.exit));
        match self.exit {
            Exit::Signal(libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGHUP) => self.failure(
                Failure::Killed,
                message,
                Some("something outside grlm ended it; often a memory limit, or an administrator"),
            ),
            _ => self.failure(
                Failure::Bug,
                message,
                Some("this is a defect in grlm: please report it with the stage's log"),
            ),
        }
    }

    fn says_out_of_memory(&self, message: &str) -> bool {
        self.kernel_out_of_memory
            || OUT_OF_MEMORY_TEXTS.iter().any(|t| message.contains(t) || self.tail.iter().any(|line| line.contains(t)))
    }

    fn failure(&self, failure: Failure, message: String, help: Option<&str>) -> AttemptFailure {
        AttemptFailure { failure, message, help: help.map(str::to_owned), tail: self.tail.to_vec() }
    }
}

fn describe(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("ended with status {code} and no word of why"),
        Exit::Signal(signal) => {
            let name = match signal {
                libc::SIGKILL => "SIGKILL",
                libc::SIGTERM => "SIGTERM",
                libc::SIGINT => "SIGINT",
                libc::SIGHUP => "SIGHUP",
                libc::SIGSEGV => "SIGSEGV",
                libc::SIGABRT => "SIGABRT",
                libc::SIGBUS => "SIGBUS",
                libc::SIGILL => "SIGILL",
                libc::SIGFPE => "SIGFPE",
                _ => return format!("was ended by signal {signal}"),
            };
            format!("was ended by {name}")
        }
    }
}

/// The last lines that were printed into a log: at most `lines`, and of at most 8 KiB. What was reported beside them
/// was shown when it came.
pub fn tail(log: &Path, lines: usize) -> Vec<String> {
    const WINDOW: u64 = 8192;
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(std::io::SeekFrom::Start(length.saturating_sub(WINDOW)))?;
        let mut bytes = Vec::new();
        file.take(WINDOW).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // A line cut at the window's edge is left out, unless it is all there is.
        Ok(match text.split_once('\n') {
            Some((_, rest)) if length > WINDOW && !rest.is_empty() => rest.to_owned(),
            _ => text,
        })
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> =
        text.lines().filter(|l| !is_reported(l)).map(str::trim_end).filter(|l| !l.is_empty()).collect();
    all[all.len().saturating_sub(lines)..].iter().map(|l| (*l).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(exit: Exit, last: Option<WorkerEvent>, asked: Asked, tail: &str, kernel: bool) -> Option<Failure> {
        let tail = [tail.to_owned()];
        Evidence { asked, exit, last: last.as_ref(), tail: &tail, kernel_out_of_memory: kernel }
            .judge()
            .err()
            .map(|e| e.failure)
    }

    fn failed(failure: Failure) -> Option<WorkerEvent> {
        Some(WorkerEvent::Failed { failure, message: "m".into(), help: None })
    }

    #[test]
    fn reasons_are_told_apart() {
        let (none, limit) = (Asked::Nothing, Asked::TimedOut(Duration::from_secs(5)));
        let finished = || Some(WorkerEvent::Finished);
        assert_eq!(judge(Exit::Code(0), finished(), none, "", false), None);
        assert_eq!(judge(Exit::Code(0), finished(), limit, "", true), None, "finished just in time");
        assert_eq!(judge(Exit::Code(0), None, none, "", false), Some(Failure::Bug), "no word");
        assert_eq!(judge(Exit::Code(1), failed(Failure::WrongInput), none, "MemoryError", true), {
            Some(Failure::WrongInput)
        });
        assert_eq!(judge(Exit::Code(1), failed(Failure::Command), none, "x", false), Some(Failure::Command));
        assert_eq!(judge(Exit::Code(1), failed(Failure::Command), none, "torch.OutOfMemoryError: CUDA", false), {
            Some(Failure::OutOfMemory)
        });
        assert_eq!(judge(Exit::Signal(9), None, none, "", false), Some(Failure::Killed));
        assert_eq!(judge(Exit::Signal(9), None, none, "", true), Some(Failure::OutOfMemory));
        assert_eq!(judge(Exit::Signal(6), None, none, "memory allocation of 8 bytes failed", false), {
            Some(Failure::OutOfMemory)
        });
        assert_eq!(judge(Exit::Signal(11), None, none, "", false), Some(Failure::Bug));
        assert_eq!(judge(Exit::Signal(9), None, limit, "", false), Some(Failure::Timeout));
        assert_eq!(judge(Exit::Code(1), failed(Failure::Stopped), Asked::Stopped, "", false), Some(Failure::Stopped));
    }

    #[test]
    fn the_tail_of_a_long_log_has_whole_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text: String = (0..5000).map(|i| format!("line {i}\n")).collect();
        std::fs::write(file.path(), text).unwrap();
        assert_eq!(tail(file.path(), 2), ["line 4998", "line 4999"]);
        assert!(tail(file.path(), 100_000).iter().all(|l| l.starts_with("line ")));
        assert!(tail(Path::new("/nonexistent"), 3).is_empty());
        std::fs::write(file.path(), "printed\n[2026-01-02 03:04:05 grlm] warning: reported\n").unwrap();
        assert_eq!(tail(file.path(), 3), ["printed"]);
    }
}
