//! `grlm compare`: the metrics of several variants side by side.

use grlm_stages::Artifact;
use serde_json::json;

use super::{
    Global, plan,
    request::{self, Part},
    sweep::Several,
};
use crate::{
    engine::run::{Foreseen, foresee},
    error::CliError,
    exit_codes::Code,
    metrics::{self, Row},
};

/// Put the metrics of variants side by side; differences are from the first
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    several: Several,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let work = request::work(args.several.load()?, &Part::default())?;
    let (store, _folder) = plan::store_for_reading(global)?;
    let plan = foresee(&store, &work)?;
    let mut rows: Vec<(usize, Row)> = Vec::new();
    let mut missing = Vec::new();
    for (id, node) in work.nodes.iter().enumerate() {
        for place in &node.places {
            let pipeline = &work.pipelines[place.pipeline];
            let stage = &pipeline.stages[place.stage];
            // What a program of the user's own wrote has no type; a file called metrics.json is taken at its word.
            let shows = |o: &grlm_stages::Output| o.artifact == Artifact::Metrics || o.file == "metrics.json";
            for output in stage.outputs.iter().filter(|o| shows(o)) {
                let variant = pipeline.variant.clone().unwrap_or_else(|| "default".into());
                let Foreseen::UpToDate(done) = &plan[id] else {
                    missing.push(format!("{variant}/{}", stage.name));
                    continue;
                };
                let Some(content) = done.outputs.get(output.name.as_ref()) else { continue };
                let read = metrics::read(&store.path_of(&content.digest))
                    .map_err(|message| CliError::message(Code::Pipeline, message, None))?;
                for (model, figures) in read {
                    let row = Row { variant: variant.clone(), stage: stage.name.to_string(), model, figures };
                    rows.push((place.pipeline, row));
                }
            }
        }
    }
    rows.sort_by_key(|(pipeline, _)| *pipeline);
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    if !missing.is_empty() {
        eprintln!("not up to date, so left out: {}; `grlm sweep` runs them", missing.join(", "));
    }
    if rows.is_empty() {
        let help = "run the variants first: `grlm sweep FILE`".to_owned();
        return Err(CliError::message(Code::Pipeline, "there are no metrics to compare", Some(help)));
    }
    if args.json {
        let all: Vec<_> = rows
            .iter()
            .map(|r| json!({"variant": r.variant, "stage": r.stage, "model": r.model, "metrics": r.figures}))
            .collect();
        println!("{}", serde_json::Value::Array(all));
    } else {
        println!("{}", metrics::table(&rows, true));
    }
    Ok(Code::Ok)
}
