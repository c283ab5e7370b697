//! `grlm explain`: why a stage is, or is not, up to date.

use grlm_cache::{ActionKey, ActionRecord, Store};

use super::{
    Global, plan,
    request::{self, Part, Selected},
};
use crate::{
    engine::{
        foresee::{Foreseen, foresee},
        nearest::{Nearest, nearest},
    },
    error::CliError,
    exit_codes::Code,
    key::Manifest,
};

/// Say what differs between a stage and its nearest earlier result
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    selected: Selected,
    /// The stage
    stage: String,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let part = Part { until: vec![args.stage.clone()], ..Part::default() };
    let work = request::work(vec![args.selected.load()?], &part)?;
    let (store, _folder) = plan::store_for_reading(global)?;
    let plan = foresee(&store, &work)?;
    let Some(id) = (0..work.nodes.len()).find(|&id| work.stage(id).name.as_str() == args.stage) else {
        return Ok(Code::Ok);
    };
    match &plan[id] {
        Foreseen::UpToDate(done) => {
            println!("{} is up to date: {}", args.stage, done.key);
            if let Some(record) = store.record(&done.key)? {
                say_who_made(&record);
                if let Ok(manifest) = serde_json::from_value::<Manifest>(record.manifest) {
                    compare(&store, &done.key, &manifest, &args.stage, "its nearest other result is")?;
                }
            }
        }
        Foreseen::Maybe { waits_for } => {
            println!("{} is decided once `{waits_for}` has its result; explain that one first", args.stage);
        }
        Foreseen::Run { reason, action } => {
            println!("{} has to run: {}", args.stage, action.key);
            // A result that was lost differs from itself in nothing.
            let lost = store.record(&action.key)?.is_some();
            if lost || !compare(&store, &action.key, &action.manifest, &args.stage, "compared with")? {
                println!("  {reason}");
            }
        }
        Foreseen::Left => {}
    }
    Ok(Code::Ok)
}

fn say_who_made(record: &ActionRecord) {
    let made = &record.provenance;
    println!("made by run {} on {}, in {:.1} s", made.run, made.host, record.duration_ms as f64 / 1e3);
    if let Some(accepted) = &record.accepted {
        println!("accepted from {}: {}", accepted.from_key, accepted.reason);
    }
}

/// Prints the nearest other result and what is different; whether there is one.
fn compare(store: &Store, key: &ActionKey, now: &Manifest, stage: &str, lead: &str) -> Result<bool, CliError> {
    let Some(Nearest { record, differences }) = nearest(store, key, now, stage)? else { return Ok(false) };
    let made = &record.provenance;
    println!("{lead} {}, of stage `{}` of {}, run {}:", record.key, made.stage, made.pipeline, made.run);
    for line in differences {
        println!("  {line}");
    }
    Ok(true)
}
