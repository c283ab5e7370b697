//! `grlm accept`: adopts a stage's last result under its present definition.

use std::time::{SystemTime, UNIX_EPOCH};

use grlm_cache::{Accepted, Access, ActionRecord, Health};
use serde::Deserialize;

use super::{
    Global,
    request::{self, Part, Selected},
};
use crate::{
    engine::{
        attempt::provenance,
        foresee::{Foreseen, foresee},
        history::History,
    },
    error::CliError,
    exit_codes::Code,
    key::Manifest,
};

/// Declare a stage's last result valid although the stage changed; the record says so
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    selected: Selected,
    /// The stage
    stage: String,
    /// Why the result is still right
    #[arg(long, default_value = "not given")]
    reason: String,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let refuse = |message: String, help: &str| CliError::message(Code::Pipeline, message, Some(help.to_owned()));
    let part = Part { until: vec![args.stage.clone()], ..Part::default() };
    let work = request::work(vec![args.selected.load()?], &part)?;
    let store = request::open_store(global, Access::Write)?;
    let plan = foresee(&store, &work)?;
    let Some(id) = (0..work.nodes.len()).find(|&id| work.stage(id).name.as_str() == args.stage) else {
        return Err(refuse(format!("there is no stage `{}`", args.stage), "`grlm plan FILE` lists them"));
    };
    let action = match &plan[id] {
        Foreseen::Run { action, .. } => action,
        Foreseen::Maybe { waits_for } => {
            let message = format!("the inputs of `{}` are not known yet", args.stage);
            return Err(refuse(message, &format!("bring `{waits_for}` up to date first, or accept it")));
        }
        Foreseen::UpToDate(_) | Foreseen::Left => {
            println!("{} is up to date; nothing to accept", args.stage);
            return Ok(Code::Ok);
        }
    };
    let mut history = History::open(store.root(), &work.title(0));
    let earlier = match history.last(&args.stage) {
        Some(key) => store.record(&key)?,
        None => None,
    };
    let Some(earlier) = earlier else {
        return Err(refuse(format!("`{}` has no earlier result", args.stage), "run it"));
    };
    for content in earlier.outputs.values() {
        if store.check(content)? != Health::Intact {
            return Err(refuse("the earlier result is gone or damaged".into(), "run the stage"));
        }
    }
    let from_key = earlier.key;
    // An older program's manifest may not be readable any more.
    let before = Manifest::deserialize(&earlier.manifest);
    let changes = before.map_or_else(|_| Vec::new(), |before| action.manifest.diff(&before));
    let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let record = ActionRecord {
        key: action.key,
        manifest: serde_json::to_value(&action.manifest).unwrap_or_default(),
        provenance: provenance(&earlier.provenance.run, &work.title(0), &args.stage),
        accepted: Some(Accepted {
            from_key,
            reason: args.reason.clone(),
            at_ms: u64::try_from(at_ms).unwrap_or(u64::MAX),
        }),
        ..earlier
    };
    store.publish(&record)?;
    history.remember(&args.stage, action.key);
    if let Err(error) = history.write(&work.title(0)) {
        tracing::warn!(%error, "what was accepted is not remembered for explanations");
    }
    println!("{} now uses the result of {from_key}", args.stage);
    for change in changes {
        println!("  although {change}");
    }
    Ok(Code::Ok)
}
