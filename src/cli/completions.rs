//! `grlm completions`: completion scripts for shells.

use clap::CommandFactory;

use super::Cli;
use crate::{error::CliError, exit_codes::Code};

/// Prints a completion script
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell to complete in
    shell: clap_complete::Shell,
}

pub fn run(args: &Args) -> Result<Code, CliError> {
    clap_complete::generate(args.shell, &mut Cli::command(), "grlm", &mut std::io::stdout());
    Ok(Code::Ok)
}
