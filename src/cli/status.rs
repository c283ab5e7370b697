//! `grlm status`: runs, the ones that go on and the ones that were, from their journals.

use std::{collections::BTreeMap, time::Duration};

use comfy_table::{Table, presets};
use grlm_stages::event::LogLevel;
use serde::Serialize;

use super::Global;
use crate::{
    error::CliError,
    events::{Body, Event, Outcome, human_bytes, human_duration, now},
    exit_codes::Code,
    journal::{CalendarStyle, RunId, RunRecord, RunState, Runs, utc},
};

/// Show runs: the ones that go on with their stages, and the latest that ended
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show one run stage by stage: its name, or `last`
    run: Option<String>,
    /// How many runs to list
    #[arg(long, short = 'n', default_value_t = 10, value_name = "COUNT")]
    count: usize,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What a stage of a run has come to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageStatus {
    pub state: &'static str,
    pub attempt: u32,
    /// When the present attempt began; seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The largest resident set, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The most held on one GPU, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_gpu_memory: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Done and all of something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<(u64, u64, String)>,
    /// Why it is to run, failed or was skipped.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// What its latest attempt warned of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[derive(Serialize)]
struct RunStatus<'a> {
    #[serde(flatten)]
    record: &'a RunRecord,
    state: &'static str,
    stages: BTreeMap<String, StageStatus>,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let runs = Runs::new(global.store.join("runs"));
    let ids = runs.list();
    let count = if args.run.is_some() { 1 } else { args.count };
    // Names tell the second of the start and no more, so a few more are looked at than are shown.
    let chosen: Vec<RunId> = match args.run.as_deref() {
        None | Some("last") => ids.into_iter().rev().take(count + 32).collect(),
        Some(text) => {
            let known = RunId::parse(text).filter(|id| ids.contains(id));
            let help = "`grlm status` lists them; `--store` names another store".to_owned();
            vec![known.ok_or_else(|| {
                CliError::message(Code::Usage, format!("there is no run `{text}` in this store"), Some(help))
            })?]
        }
    };
    let mut records: Vec<RunRecord> = chosen.iter().filter_map(|id| runs.record(id).ok()).collect();
    records.sort_by(|a, b| b.started.total_cmp(&a.started));
    records.truncate(count);
    let stages_of = |record: &RunRecord| stages(&runs.events(&record.id).unwrap_or_default(), record.state());
    if args.json {
        let all: Vec<RunStatus<'_>> = records
            .iter()
            .map(|record| RunStatus { record, state: word(record.state()), stages: stages_of(record) })
            .collect();
        println!("{}", serde_json::to_string(&all).unwrap_or_default());
        return Ok(Code::Ok);
    }
    if records.is_empty() {
        eprintln!("no run is recorded in {}", global.store.display());
        return Ok(Code::Ok);
    }
    if args.run.is_some() {
        for record in &records {
            show_run(record, &stages_of(record));
        }
        return Ok(Code::Ok);
    }
    list(&records);
    for record in records.iter().filter(|record| record.state() == RunState::Running) {
        println!();
        show_run(record, &stages_of(record));
    }
    Ok(Code::Ok)
}

fn list(records: &[RunRecord]) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["run", "pipeline", "state", "started (UTC)", "took", "ran", "cached", "failed", "skipped"]);
    for record in records {
        let counts = record.ended.as_ref().map(|end| end.counts);
        let count = |get: fn(crate::events::Counts) -> usize| counts.map(|c| get(c).to_string()).unwrap_or_default();
        table.add_row([
            record.id.to_string(),
            title(record),
            word(record.state()).to_owned(),
            utc(record.started as u64, &CalendarStyle::Readable),
            took(record),
            count(|c| c.ran),
            count(|c| c.cached),
            count(|c| c.failed),
            count(|c| c.skipped),
        ]);
    }
    println!("{}", table.trim_fmt());
}

fn show_run(record: &RunRecord, stages: &BTreeMap<String, StageStatus>) {
    let process = &record.process;
    println!("{} {}: {}, process {} on {}", record.id, title(record), word(record.state()), process.pid, process.host);
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    for (name, stage) in stages {
        let time = stage.seconds.or_else(|| stage.since.map(|since| now() - since));
        let time = time.map(|s| human_duration(Duration::from_secs_f64(s.max(0.0)))).unwrap_or_default();
        let mut notes: Vec<String> = Vec::new();
        notes.extend(stage.progress.as_ref().map(|(done, total, unit)| format!("{done}/{total} {unit}s")));
        notes.extend((stage.attempt > 1).then(|| format!("attempt {}", stage.attempt)));
        notes.extend((!stage.devices.is_empty()).then(|| stage.devices.join(",")));
        notes.extend(stage.peak_memory.map(human_bytes));
        notes.extend(stage.peak_gpu_memory.map(|bytes| format!("{} on a GPU", human_bytes(bytes))));
        notes.extend((!stage.note.is_empty()).then(|| stage.note.clone()));
        table.add_row([format!("  {name}"), stage.state.to_owned(), time, notes.join(", ")]);
    }
    println!("{}", table.trim_fmt());
    for (name, stage) in stages {
        for warning in &stage.warnings {
            println!("  warning of {name}: {warning}");
        }
    }
}

fn title(record: &RunRecord) -> String {
    let variant = record.variant.as_ref().map(|variant| format!("@{variant}")).unwrap_or_default();
    let name = record.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    format!("{}{variant}{name}", record.pipeline)
}

fn took(record: &RunRecord) -> String {
    let end = match (&record.ended, record.state()) {
        (Some(end), _) => end.t,
        (None, RunState::Running) => now(),
        _ => return String::new(),
    };
    human_duration(Duration::from_secs_f64((end - record.started).max(0.0)))
}

fn word(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Ended(Outcome::Succeeded) => "done",
        RunState::Ended(Outcome::Failed) => "failed",
        RunState::Ended(Outcome::Interrupted) => "interrupted",
        RunState::Died => "died",
        RunState::Elsewhere => "on another machine",
    }
}

/// What the events of a run say of each stage. A stage that was running when its run died did not end.
pub fn stages(events: &[Event], run: RunState) -> BTreeMap<String, StageStatus> {
    let mut stages: BTreeMap<String, StageStatus> = BTreeMap::new();
    for event in events {
        let Some(name) = &event.stage else { continue };
        let stage = stages.entry(name.clone()).or_insert_with(|| StageStatus {
            state: "waiting",
            attempt: 0,
            since: None,
            seconds: None,
            peak_memory: None,
            peak_gpu_memory: None,
            devices: Vec::new(),
            progress: None,
            note: String::new(),
            warnings: Vec::new(),
        });
        match &event.body {
            Body::Queued { reason, .. } => (stage.state, stage.note) = ("queued", reason.clone()),
            Body::Started { devices, .. } => {
                (stage.state, stage.since, stage.attempt) = ("running", Some(event.t), event.attempt.unwrap_or(1));
                stage.devices.clone_from(devices);
                stage.progress = None;
                stage.warnings.clear();
            }
            Body::Log { level: LogLevel::Warn, message } => stage.warnings.push(message.clone()),
            Body::Progress { done, total, unit } => stage.progress = Some((*done, *total, unit.clone())),
            Body::Cached { .. } => stage.state = "cached",
            Body::Finished { seconds, peak_memory, peak_gpu_memory } => {
                stage.peak_gpu_memory = *peak_gpu_memory;
                (stage.state, stage.seconds, stage.peak_memory) = ("done", Some(*seconds), Some(*peak_memory));
                stage.progress = None;
                // Why it had to run is no more true of what it is now.
                stage.note.clear();
            }
            Body::Failed { message, seconds, retry_in, .. } => {
                stage.state = if retry_in.is_some() { "to be tried again" } else { "failed" };
                (stage.seconds, stage.note) = (Some(*seconds), message.clone());
            }
            Body::Skipped { because } => (stage.state, stage.note) = ("skipped", because.clone()),
            _ => {}
        }
    }
    if matches!(run, RunState::Died) {
        for stage in stages.values_mut().filter(|s| matches!(s.state, "running" | "queued" | "to be tried again")) {
            (stage.state, stage.since) = ("lost with its run", None);
        }
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_about_each_stage_counts() {
        let id = RunId::parse("20260102T030405-abcd").unwrap();
        let event =
            |stage: &str, attempt, body| Event { t: 1.0, run: id.clone(), stage: Some(stage.into()), attempt, body };
        let queued = || Body::Queued { reason: "never ran".into(), estimate: None };
        let started = || Body::Started { cpus: 1, devices: vec!["gpu0".into()] };
        let events = [
            event("a", None, queued()),
            event("a", Some(1), started()),
            event("a", Some(1), Body::Progress { done: 3, total: 9, unit: "row".into() }),
            event("b", None, Body::Cached { saved: None, key: None }),
            event("c", None, queued()),
            event("d", None, queued()),
            event("d", Some(1), Body::Log { level: LogLevel::Warn, message: "of the first attempt".into() }),
            event("d", Some(2), started()),
            event("d", Some(2), Body::Log { level: LogLevel::Warn, message: "odd".into() }),
            event("d", Some(2), Body::Log { level: LogLevel::Info, message: "even".into() }),
            event("d", Some(2), Body::Finished { seconds: 2.0, peak_memory: 7, peak_gpu_memory: None }),
        ];
        let states = |run| stages(&events, run).into_values().map(|s| s.state).collect::<Vec<_>>();
        assert_eq!(states(RunState::Running), ["running", "cached", "queued", "done"]);
        assert_eq!(states(RunState::Died), ["lost with its run", "cached", "lost with its run", "done"]);
        let found = stages(&events, RunState::Running);
        assert_eq!(found["a"].progress, Some((3, 9, "row".into())));
        assert_eq!((found["d"].attempt, found["d"].peak_memory), (2, Some(7)));
        assert_eq!((found["c"].note.as_str(), found["d"].note.as_str()), ("never ran", ""));
        assert_eq!(found["d"].warnings, ["odd"]);
    }
}
