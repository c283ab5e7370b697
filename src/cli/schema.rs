//! `grlm schema`: the JSON Schema of pipeline files, for editors.

use crate::{error::CliError, exit_codes::Code, pipeline};

/// Print the JSON Schema of pipeline files, for editors
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> Result<Code, CliError> {
    let text = serde_json::to_string_pretty(&pipeline::schema())
        .map_err(|e| CliError::message(Code::Internal, format!("the schema cannot be written: {e}"), None))?;
    println!("{text}");
    Ok(Code::Ok)
}
