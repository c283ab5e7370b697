//! Stage `command`: any program of the user's own, run by `sh -c`.
//!
//! The orchestrator has already put shell-quoted paths in place of `${inputs.x}` and `${outputs.x}`; declared
//! environment, secrets and code are its business too.

use std::process::Stdio;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Artifact, Ports, Stage, StageContext, StageError};

pub struct Command;

/// Parameters of `command`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The command line, run by `sh -c` in the working directory. `${inputs.NAME}` and `${outputs.NAME}` stand
    /// for paths and are quoted for the shell.
    pub run: String,
}

impl Stage for Command {
    const KIND: &'static str = "command";
    const SUMMARY: &'static str = "any program, with declared inputs, outputs, code and environment";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports { open_inputs: Some(Artifact::Any), open_outputs: true, ..Ports::default() }
    }

    fn run(params: &Params, _cx: &mut StageContext) -> Result<(), StageError> {
        let status = std::process::Command::new("sh")
            .args(["-c", &params.run])
            .stdin(Stdio::null())
            .status()
            .map_err(|e| StageError::io("start", "sh", e))?;
        if status.success() {
            return Ok(());
        }
        let message = match status.code() {
            Some(code) => format!("the command ended with status {code}"),
            None => format!("the command was ended by a signal ({status})"),
        };
        Err(StageError::Command { message, help: Some("its output is in the stage's log: `grlm logs STAGE`".into()) })
    }
}
