//! `grlm explain`: why a stage is, or is not, up to date.

use super::{
    Global, plan,
    request::{self, Part, Selected},
};
use crate::{
    engine::{
        decide,
        foresee::{Foreseen, foresee},
        history::History,
    },
    error::CliError,
    exit_codes::Code,
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
                let p = &record.provenance;
                println!("made by run {} on {}, in {:.1} s", p.run, p.host, record.duration_ms as f64 / 1e3);
                if let Some(accepted) = &record.accepted {
                    println!("accepted from {}: {}", accepted.from_key, accepted.reason);
                }
            }
        }
        Foreseen::Maybe { waits_for } => {
            println!("{} is decided once `{waits_for}` has its result; explain that one first", args.stage);
        }
        Foreseen::Run { reason, action } => {
            println!("{} has to run: {}", args.stage, action.key);
            let history = History::open(store.root(), &work.title(0));
            let earlier = history.last(&args.stage).filter(|k| *k != action.key);
            match earlier.and_then(|k| Some((k, decide::differences(&store, &k, &action.manifest)?))) {
                Some((key, lines)) => {
                    println!("compared with {key}:");
                    for line in lines {
                        println!("  {line}");
                    }
                }
                None => println!("  {reason}"),
            }
        }
        Foreseen::Left => {}
    }
    Ok(Code::Ok)
}
