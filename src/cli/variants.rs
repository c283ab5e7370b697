//! `grlm variants`: the variants of a pipeline file.

use std::path::PathBuf;

use crate::{error::CliError, exit_codes::Code, pipeline};

/// List the variants of a pipeline, matrix cells one by one
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pipeline file
    file: PathBuf,
}

pub fn run(args: &Args) -> Result<Code, CliError> {
    for name in pipeline::variants(&args.file)? {
        println!("{name}");
    }
    Ok(Code::Ok)
}
