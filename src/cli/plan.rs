//! `grlm plan`: what would run, and why.

use std::time::Duration;

use grlm_cache::{Access, Store};
use serde_json::json;

use super::sweep::Several;
use super::{
    Global,
    forecast::{self, Forecast},
    request::{self, Part, Selected},
};
use crate::{
    device::{self, discover},
    engine::{
        foresee::{Foreseen, foresee},
        history::History,
        measured::Measured,
        rows::{self, RowsForeseen},
        secrets,
        work::{NodeId, Work},
    },
    error::CliError,
    events::{human_bytes, human_duration},
    exit_codes::Code,
};

/// Say what would run, and why; run nothing
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    selected: Selected,
    #[command(flatten)]
    part: Part,
    /// Plan these variants as one graph, as `grlm sweep` runs them; without names, everything the file has
    #[arg(long, num_args = 0.., value_name = "VARIANT", conflicts_with_all = ["variant", "until", "from", "only", "force"])]
    sweep: Option<Vec<String>>,
    /// Play the run on these GPUs: `0,2`, `none`, or made-up ones, `sim:8x80GiB`
    #[arg(long, value_name = "DEVICES")]
    devices: Option<device::Selection>,
    #[command(flatten)]
    forecast: Forecast,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let work = match &args.sweep {
        None => request::work(vec![args.selected.load()?], &args.part)?,
        Some(variants) => {
            let (file, set) = (args.selected.file.clone(), args.selected.set.clone());
            let several = Several { file, variants: variants.clone(), set };
            request::work(several.load()?, &Part::default())?
        }
    };
    let Some(devices) = &args.devices else {
        return show(&work, &device::Selection::All, global, args.json);
    };
    let mut machine = request::discover(devices, &work)?;
    if matches!(devices, device::Selection::Simulated(_)) {
        forecast::furnish(&mut machine);
    }
    request::check_fits(&machine, &work)?;
    if !args.json {
        show(&work, devices, global, false)?;
    }
    let (store, _folder) = store_for_reading(global)?;
    let foretold = args.forecast.play(&store, &work, &foresee(&store, &work)?, &machine)?;
    if args.json {
        println!("{}", foretold.as_json(&work, &machine));
    } else {
        println!("\n{}", foretold.as_text(&work, &machine));
    }
    Ok(Code::Ok)
}

/// Opens the store for reading; where there is none yet, an empty one in a temporary folder stands in.
pub fn store_for_reading(global: &Global) -> Result<(Store, Option<tempfile::TempDir>), CliError> {
    if global.store.join("VERSION").exists() {
        // Writing lets the index remember what was hashed; a read-only store is planned all the same.
        let store = Store::open(&global.store, Access::Write).or_else(|_| Store::open(&global.store, Access::Read))?;
        return Ok((store, None));
    }
    Store::check_place(&global.store)?;
    let folder = tempfile::tempdir()
        .map_err(|e| CliError::message(Code::Internal, format!("cannot make a temporary folder: {e}"), None))?;
    Ok((Store::open(folder.path(), Access::Write)?, Some(folder)))
}

/// Says what would run on these devices, and how many rows of it.
pub fn show(work: &Work, devices: &device::Selection, global: &Global, as_json: bool) -> Result<Code, CliError> {
    let (store, _folder) = store_for_reading(global)?;
    let plan = foresee(&store, work)?;
    let runs = |id: &NodeId| matches!(plan[*id], Foreseen::Run { .. });
    let with_gpus = (0..plan.len()).filter(runs).any(|id| work.stage(id).resources.gpus > 0);
    // Where devices cannot be found out, the run will say why; here they only tell which measurements count.
    let machine = discover::machine(devices, with_gpus).or_else(|_| discover::machine(&device::Selection::None, false));
    let a_row = |id: NodeId| {
        let (stage, place) = (work.stage(id), work.nodes[id].places[0]);
        let last = History::open(store.root(), &work.title(place.pipeline)).last(stage.name.as_str());
        Measured::seconds_per_row(&store, stage, machine.as_ref().ok()?, last)
    };
    let mut lines = Vec::new();
    let mut count = [0usize; 3];
    for (id, foreseen) in plan.iter().enumerate() {
        let (what, why, rows) = match foreseen {
            Foreseen::UpToDate(_) => {
                count[0] += 1;
                ("cached", String::new(), Ok(None))
            }
            Foreseen::Run { reason, action } => {
                count[1] += 1;
                ("run", reason.clone(), rows::foresee(&store, work.stage(id), &work.nodes[id], action, a_row(id)))
            }
            Foreseen::Maybe { waits_for } => {
                count[2] += 1;
                ("maybe", format!("waits for `{waits_for}`"), Ok(None))
            }
            Foreseen::Left => continue,
        };
        // What its estimate says, or the pipeline.
        let memory = if what == "cached" { 0 } else { work.stage(id).resources.memory };
        lines.push((work.nodes[id].label.as_str(), what, why, rows, memory));
    }
    let refused = (count[1] + count[2] > 0).then(|| refusal(devices, &store, work)).flatten();
    if as_json {
        refused.iter().for_each(|refused| eprintln!("{refused}"));
        let stages: Vec<_> = lines
            .iter()
            .map(|(stage, what, why, rows, memory)| {
                let mut line = json!({"stage": stage, "action": what, "reason": why});
                if *memory > 0 {
                    line["memory"] = json!(memory);
                }
                match rows {
                    Ok(Some(rows)) => {
                        line["rows"] = json!({
                            "unit": rows.unit, "total": rows.total, "missing": rows.missing, "seconds": rows.seconds,
                        });
                    }
                    Ok(None) => {}
                    Err(untold) => line["rows"] = json!({ "error": untold.to_string(), "help": untold.help() }),
                }
                line
            })
            .collect();
        println!("{}", serde_json::Value::Array(stages));
        return Ok(Code::Ok);
    }
    if !global.quiet {
        let width = lines.iter().map(|(stage, ..)| stage.chars().count()).max().unwrap_or(0);
        for (stage, what, why, rows, memory) in &lines {
            let takes = if *memory > 0 { format!("; takes {} of memory", human_bytes(*memory)) } else { String::new() };
            println!("{}", format!("{what:<7} {stage:<width$}  {why}{takes}").trim_end());
            let rows = match rows {
                Ok(None) => continue,
                Ok(Some(rows)) => in_words(rows),
                Err(untold) => {
                    let help = untold.help().map(|help| format!(" ({help})")).unwrap_or_default();
                    format!("its rows cannot be told: {untold}{help}")
                }
            };
            println!("{:<7} {:<width$}  {rows}", "", "");
        }
    }
    println!("{} cached, {} to run, {} maybe", count[0], count[1], count[2]);
    if let Some(refused) = refused {
        println!("{refused}");
    }
    Ok(Code::Ok)
}

/// Why a run would not even begin on this machine, and what to do.
fn refusal(devices: &device::Selection, store: &Store, work: &Work) -> Option<String> {
    let machine = request::machine(devices, work).err();
    let error = machine.or_else(|| secrets::check(store, work).err().map(CliError::from))?;
    let help = error.report.help().map(|help| format!(" ({help})")).unwrap_or_default();
    Some(format!("`grlm run` will refuse: {}{help}", error.report))
}

/// `12 of 3,000 items are missing, about 4 s`.
fn in_words(rows: &RowsForeseen) -> String {
    let RowsForeseen { unit, total, missing, .. } = rows;
    let time = match rows.seconds {
        _ if *missing == 0 => String::new(),
        Some(seconds) => format!(", about {}", human_duration(Duration::from_secs_f64(seconds.min(1e9)))),
        None => ", how long one takes is not known yet".to_owned(),
    };
    format!("{missing} of {total} {unit}s are missing{time}")
}
