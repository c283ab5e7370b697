//! The program's exit codes: fixed, and documented in the README.

use std::process::ExitCode;

/// Why the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Everything asked for is done or was up to date.
    Ok = 0,
    /// At least one stage failed.
    StageFailed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The pipeline file, or a file that it names, is wrong.
    Pipeline = 3,
    /// The store cannot be used: no space, no permission, written by a newer version.
    Store = 4,
    /// A stage needs more than the machine has.
    Resources = 5,
    /// A check found something wrong (`verify`, `doctor`, `schema --check`).
    Check = 6,
    /// A defect in grlm.
    Internal = 70,
    /// Interrupted by Ctrl-C or a termination signal.
    Interrupted = 130,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        ExitCode::from(code as u8)
    }
}
