//! `grlm logs`: what a stage printed.

use std::{
    fs::File,
    io::{self, Read, Write},
    time::Duration,
};

use super::Global;
use crate::{
    error::CliError,
    exit_codes::Code,
    journal::{RunId, RunState, Runs},
};

/// Show what a stage printed in its latest attempt
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stage
    stage: String,
    /// A run; by default the latest in which the stage ran
    #[arg(long, value_name = "ID")]
    run: Option<String>,
    /// Go on showing what comes until the run ends
    #[arg(long, short)]
    follow: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let refuse = |message: String, help: &str| CliError::message(Code::Usage, message, Some(help.into()));
    let runs = Runs::new(global.store.join("runs"));
    let candidates: Vec<RunId> = match &args.run {
        Some(text) => {
            vec![RunId::parse(text).ok_or_else(|| refuse(format!("`{text}` is no run"), "`grlm status` lists runs"))?]
        }
        None => runs.list().into_iter().rev().collect(),
    };
    let found = candidates.into_iter().find_map(|id| Some((runs.attempts(&id, &args.stage).last().copied()?, id)));
    let Some((attempt, id)) = found else {
        return Err(refuse(format!("no run has a log of stage `{}`", args.stage), "`grlm status` shows what ran"));
    };
    let path = runs.log(&id, &args.stage, attempt);
    let failed = |e: io::Error| CliError::message(Code::Store, format!("cannot read {}: {e}", path.display()), None);
    let mut file = File::open(&path).map_err(failed)?;
    loop {
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed)?;
        let _ = io::stdout().write_all(&text).and_then(|()| io::stdout().flush());
        let goes_on = args.follow && runs.record(&id).is_ok_and(|r| matches!(r.state(), RunState::Running));
        if !goes_on {
            return Ok(Code::Ok);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
