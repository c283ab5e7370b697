//! `grlm logs`: what a stage reported and printed.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use grlm_cache::{Access, ActionKey, Store};

use super::Global;
use crate::{
    error::CliError,
    events::{Body, Event},
    exit_codes::Code,
    journal::{RunId, RunState, Runs},
    pipeline::hint,
};

/// Show what a stage reported and printed in its latest attempt
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stage
    stage: String,
    /// A run; by default the latest that has the stage
    #[arg(long, value_name = "ID")]
    run: Option<String>,
    /// Go on showing what comes until the run ends
    #[arg(long, short)]
    follow: bool,
}

/// Where a stage's last words are.
struct Found {
    /// The run that has the stage.
    run: RunId,
    /// The run in which it ran, if it was cached in that one; `None` if that run's log is gone.
    ran_in: Option<RunId>,
    log: Option<PathBuf>,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let runs = Runs::new(global.store.join("runs"));
    let candidates: Vec<RunId> = match &args.run {
        Some(text) => {
            let id = RunId::parse(text);
            vec![id.ok_or_else(|| refuse(format!("`{text}` is no run"), "`grlm status` lists runs"))?]
        }
        None => latest_first(&runs),
    };
    let found = candidates.iter().find_map(|id| find(&runs, id, &args.stage, global));
    let Some(Found { run, ran_in, log }) = found else {
        let help = known_help(&runs, &candidates, &args.stage);
        return Err(refuse(format!("no run has a log of stage `{}`", args.stage), &help));
    };
    let cached = format!("`{}` was cached in run {run}", args.stage);
    let Some(log) = log else {
        return Err(refuse(
            format!("{cached}, and the log of the run that made it is gone"),
            "`--force` runs it again",
        ));
    };
    // The log of a run that is over grows no more.
    let follow = args.follow && ran_in.is_none();
    if let Some(ran_in) = ran_in {
        eprintln!("{cached}; it ran in run {ran_in}");
    }
    show(&runs, &run, &log, follow)
}

/// Names tell the second of the start and no more.
fn latest_first(runs: &Runs) -> Vec<RunId> {
    let records = runs.list().into_iter().filter_map(|id| runs.record(&id).ok());
    let mut started: Vec<(f64, RunId)> = records.map(|record| (record.started, record.id)).collect();
    started.sort_by(|a, b| b.0.total_cmp(&a.0));
    started.into_iter().map(|(_, id)| id).collect()
}

/// The stage of these runs that may have been meant, or all of them.
fn known_help(runs: &Runs, candidates: &[RunId], stage: &str) -> String {
    const RECENT: usize = 20;
    let events = candidates.iter().take(RECENT).filter_map(|id| runs.events(id).ok()).flatten();
    let known: BTreeSet<String> = events.filter_map(|event| event.stage).collect();
    let help = hint::help(stage, known.iter().map(String::as_str));
    help.unwrap_or_else(|| "`grlm status` shows what ran".to_owned())
}

fn refuse(message: String, help: &str) -> CliError {
    CliError::message(Code::Usage, message, Some(help.into()))
}

/// The stage's log in this run, or in the one that made the result that this one used.
fn find(runs: &Runs, run: &RunId, stage: &str, global: &Global) -> Option<Found> {
    if let Some(attempt) = runs.attempts(run, stage).last() {
        return Some(Found { run: run.clone(), ran_in: None, log: Some(runs.log(run, stage, *attempt)) });
    }
    let events = runs.events(run).ok()?;
    let cached = |event: &Event| match event.body {
        Body::Cached { key, .. } if event.stage.as_deref() == Some(stage) => Some(key),
        _ => None,
    };
    let key = events.iter().find_map(cached)?;
    let made = key.and_then(|key| maker(key, global));
    let log = made.as_ref().and_then(|(ran_in, label)| {
        let attempt = runs.attempts(ran_in, label).last().copied()?;
        Some(runs.log(ran_in, label, attempt))
    });
    Some(Found { run: run.clone(), ran_in: made.map(|(ran_in, _)| ran_in), log })
}

/// The run that made a result, and what the stage was called there.
fn maker(key: ActionKey, global: &Global) -> Option<(RunId, String)> {
    let store = Store::open(&global.store, Access::Read).ok()?;
    let made = store.record(&key).ok()??.provenance;
    Some((RunId::parse(&made.run)?, made.stage))
}

fn show(runs: &Runs, run: &RunId, log: &Path, follow: bool) -> Result<Code, CliError> {
    let failed = |e: io::Error| CliError::message(Code::Store, format!("cannot read {}: {e}", log.display()), None);
    let mut file = File::open(log).map_err(failed)?;
    loop {
        // Asked first, so that what is written between the last look and the run's end is read.
        let goes_on = follow && runs.record(run).is_ok_and(|r| matches!(r.state(), RunState::Running));
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed)?;
        let _ = io::stdout().write_all(&text).and_then(|()| io::stdout().flush());
        if !goes_on {
            return Ok(Code::Ok);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
