//! Stage `command`: any program of the user's own, run by `sh -c`.
//!
//! The orchestrator has already put shell-quoted paths in place of `${inputs.x}` and `${outputs.x}`; declared
//! environment, secrets and code are its business too, and so is ending the program: it shares the worker's process
//! group, to which SIGTERM and SIGKILL are sent.
//!
//! With `rows`, the program works row by row instead: see [`rows`] for what it is given and what it answers.

use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Artifact, ParamIssue, Ports, Stage, StageContext, StageError, rows::RowJob};

mod program;
pub mod rows;
mod talk;

pub struct Command;

/// Parameters of `command`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The command line, run by `sh -c` in the working directory. `${inputs.NAME}` and `${outputs.NAME}` stand
    /// for paths and are quoted for the shell.
    pub run: String,
    /// Runs the program for single rows of an input, and only for those whose results are not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<rows::RowParams>,
}

impl Stage for Command {
    const KIND: &'static str = "command";
    const SUMMARY: &'static str = "any program, with declared inputs, outputs, code and environment";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports { open_inputs: Some(Artifact::Any), open_outputs: true, ..Ports::default() }
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        params.rows.as_ref().map(|rows| rows.check(&params.run)).unwrap_or_default()
    }

    fn check_ports(params: &Params, inputs: &[&str], outputs: &[&str]) -> Vec<ParamIssue> {
        params.rows.as_ref().map(|rows| rows.check_ports(&params.run, inputs, outputs)).unwrap_or_default()
    }

    fn plan_rows(params: &Params, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        params.rows.as_ref().map(|rows| rows::plan(params, rows, cx)).transpose()
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        if let Some(rows) = &params.rows {
            return rows::run(params, rows, cx);
        }
        cx.check_stop()?;
        // The program stays in the worker's process group: a stop reaches it with the worker, and nothing it starts
        // outlives the attempt.
        let status = std::process::Command::new("sh")
            .args(["-c", &params.run])
            .stdin(Stdio::null())
            .status()
            .map_err(|e| StageError::io("start", "sh", e))?;
        if status.success() {
            return Ok(());
        }
        cx.check_stop()?;
        Err(failure(status))
    }
}

fn failure(status: ExitStatus) -> StageError {
    let help = Some("its output is in the stage's log: `grlm logs STAGE`".to_owned());
    // A shell reports a program that signal n ended as 128 + n.
    let signal = status.signal().or_else(|| status.code().filter(|c| (129..=160).contains(c)).map(|c| c - 128));
    match (signal, status.code()) {
        (Some(libc::SIGKILL), _) => StageError::Killed {
            message: "the command was killed (SIGKILL), which grlm did not do".into(),
            help: Some("often a memory limit: see the system's log".into()),
        },
        (Some(libc::SIGTERM), _) => {
            StageError::Killed { message: "the command was ended (SIGTERM), which grlm did not do".into(), help }
        }
        (_, Some(code)) => StageError::Command { message: format!("the command ended with status {code}"), help },
        (Some(signal), None) => {
            StageError::Command { message: format!("the command was ended by signal {signal}"), help }
        }
        (None, None) => StageError::Command { message: format!("the command failed ({status})"), help },
    }
}
