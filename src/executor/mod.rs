//! Running one attempt of a stage as a process of its own.
//!
//! [`AttemptSpec`] is all that a worker needs, written as `attempt.json` into the attempt's folder; [`worker`] is the
//! program behind the hidden verb `__worker`, and [`rows`] its way into the store's rows, watched over by [`guard`];
//! [`Launcher`] starts one on this machine and watches it to its end; [`report`] writes what it says into the stage's
//! log; [`retry`] says whether a failure is worth another attempt. Which stage runs when, and on what, is
//! [`crate::schedule`]'s business; where results go afterwards is the engine's.

pub mod environment;
pub mod guard;
pub mod interrupt;
pub mod launch;
pub mod outcome;
pub mod process;
pub mod redact;
pub mod report;
pub mod retry;
pub mod rows;
pub mod spec;
pub mod worker;

pub use interrupt::{Stop, StopReceiver, StopSender, stop_channel};
pub use launch::{Launch, LaunchError, Launcher};
pub use outcome::{AttemptEnd, AttemptFailure};
pub use redact::Redactor;
pub use spec::AttemptSpec;
