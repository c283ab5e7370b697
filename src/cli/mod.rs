//! The command line: one file per verb, each with its arguments and a `run`.
//!
//! Verbs print results to stdout and everything else to stderr; nothing below them prints.

mod accept;
mod compare;
mod completions;
mod dag;
mod doctor;
mod du;
mod explain;
mod forecast;
mod gc;
mod logs;
mod pin;
mod plan;
mod request;
mod rows;
mod run;
mod schema;
mod stages;
mod status;
mod sweep;
mod variants;
mod verify;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

use crate::{error::CliError, exit_codes::Code};

/// Runs generative-recommendation pipelines, and only the parts of them that changed.
#[derive(Debug, Parser)]
#[command(name = "grlm", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Where results are kept
    #[arg(long, global = true, env = "GRLM_STORE", default_value = ".grlm", value_name = "FOLDER")]
    pub store: PathBuf,
    /// Say nothing but results and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Run(run::Args),
    Plan(plan::Args),
    Explain(explain::Args),
    Accept(accept::Args),
    Sweep(sweep::Args),
    Compare(compare::Args),
    Variants(variants::Args),
    Status(status::Args),
    Logs(logs::Args),
    Du(du::Args),
    Gc(gc::Args),
    Verify(verify::Args),
    Pin(pin::Args),
    Unpin(pin::UnpinArgs),
    Doctor(doctor::Args),
    Dag(dag::Args),
    Rows(rows::Args),
    Stages(stages::Args),
    Schema(schema::Args),
    Completions(completions::Args),
}

/// Parses the arguments, runs the verb, prints its error.
pub fn main() -> ExitCode {
    if let Some(code) = worker_main() {
        return code;
    }
    start_tracing();
    let cli = Cli::parse();
    if !matches!(cli.verb, Verb::Run(_) | Verb::Sweep(_)) {
        end_at_a_closed_pipe();
    }
    match dispatch(cli) {
        Ok(code) => code.into(),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{:?}", error.report);
            error.code.into()
        }
    }
}

/// Lets the system end this process when nobody reads its output any more (`grlm stages | head`), as it ends other tools.
/// Not for verbs that start stages: they write to pipes of their own, whose other end may well close.
fn end_at_a_closed_pipe() {
    // SAFETY: installs the default action; no handler of ours is involved, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// `grlm __worker FOLDER [--parent PID]`: not for users, and ahead of the parser because every attempt pays for it.
fn worker_main() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != "__worker" {
        return None;
    }
    start_tracing();
    let Some(folder) = arguments.next() else { return Some(Code::Usage.into()) };
    let parent = arguments.nth(1).and_then(|pid| pid.to_str()?.parse().ok());
    Some(crate::executor::worker::main(folder.as_ref(), parent))
}

fn dispatch(cli: Cli) -> Result<Code, CliError> {
    match &cli.verb {
        Verb::Run(args) => run::run(args, &cli.global),
        Verb::Plan(args) => plan::run(args, &cli.global),
        Verb::Explain(args) => explain::run(args, &cli.global),
        Verb::Accept(args) => accept::run(args, &cli.global),
        Verb::Sweep(args) => sweep::run(args, &cli.global),
        Verb::Compare(args) => compare::run(args, &cli.global),
        Verb::Variants(args) => variants::run(args),
        Verb::Logs(args) => logs::run(args, &cli.global),
        Verb::Status(args) => status::run(args, &cli.global),
        Verb::Du(args) => du::run(args, &cli.global),
        Verb::Gc(args) => gc::run(args, &cli.global),
        Verb::Verify(args) => verify::run(args, &cli.global),
        Verb::Pin(args) => pin::run(args, &cli.global),
        Verb::Unpin(args) => pin::unpin(args, &cli.global),
        Verb::Doctor(args) => doctor::run(args, &cli.global),
        Verb::Dag(args) => dag::run(args),
        Verb::Rows(args) => rows::run(args, &cli.global),
        Verb::Schema(args) => schema::run(args),
        Verb::Stages(args) => stages::run(args),
        Verb::Completions(args) => completions::run(args),
    }
}

/// Diagnostics for developers, on stderr, off unless `GRLM_LOG` says otherwise.
fn start_tracing() {
    if std::env::var_os("GRLM_LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_env("GRLM_LOG"))
            .with_writer(std::io::stderr)
            .init();
    }
}
