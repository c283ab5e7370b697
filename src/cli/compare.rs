//! `grlm compare`: the metrics of several variants side by side, and how sure their differences are.

use std::collections::HashMap;

use grlm_cache::Store;
use grlm_stages::Artifact;
use serde_json::json;

use super::{
    Global, plan,
    request::{self, Part},
    sweep::Several,
};
use crate::{
    differences::{self, Baseline, Compared, Ranks},
    engine::{
        foresee::{Foreseen, foresee},
        run::Done,
    },
    error::CliError,
    exit_codes::Code,
    metrics::{self, Row},
    pipeline::Stage,
};

/// Put the metrics of variants side by side, with differences, their intervals and p-values
///
/// A model is compared with itself in the first variant, or with --baseline. Intervals and p-values come from a paired
/// bootstrap over the users that both evaluated; p-values are corrected (Holm) for the number of differences shown.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    several: Several,
    /// Compare with this model: of the same variant, or of the one named
    #[arg(long, value_name = "[VARIANT/]MODEL")]
    baseline: Option<String>,
    /// Bootstrap samples of users; 0 leaves intervals and p-values out
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    resamples: u32,
    /// Seed of the bootstrap
    #[arg(long, default_value_t = 42, value_name = "N")]
    seed: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let work = request::work(args.several.load()?, &Part::default())?;
    let (store, _folder) = plan::store_for_reading(global)?;
    let plan = foresee(&store, &work)?;
    let mut found: Vec<(usize, Row, Option<Ranks>)> = Vec::new();
    let mut missing = Vec::new();
    let mut unreadable = Vec::new();
    for (id, node) in work.nodes.iter().enumerate() {
        for place in &node.places {
            let pipeline = &work.pipelines[place.pipeline];
            let stage = &pipeline.stages[place.stage];
            if !stage.outputs.iter().any(shows) {
                continue;
            }
            let variant = pipeline.variant.clone().unwrap_or_else(|| "default".into());
            let Foreseen::UpToDate(done) = &plan[id] else {
                missing.push(format!("{variant}/{}", stage.name));
                continue;
            };
            let evaluated = match read(&store, stage, done) {
                Ok(evaluated) => evaluated,
                Err(why) => {
                    unreadable.push(format!("{variant}/{}: {why}", stage.name));
                    continue;
                }
            };
            for (model, figures, ranks) in evaluated {
                let row = Row { variant: variant.clone(), stage: stage.name.to_string(), model, figures };
                found.push((place.pipeline, row, ranks));
            }
        }
    }
    found.sort_by_key(|(pipeline, ..)| *pipeline);
    let (rows, ranks): (Vec<Row>, Vec<Option<Ranks>>) = found.into_iter().map(|(_, row, ranks)| (row, ranks)).unzip();
    if !missing.is_empty() {
        eprintln!("not up to date, so left out: {}; `grlm sweep` runs them", missing.join(", "));
    }
    for why in &unreadable {
        eprintln!("cannot be read, so left out: {why}");
    }
    if rows.is_empty() {
        let help = match unreadable.as_slice() {
            [] => "run the variants first: `grlm sweep FILE`".to_owned(),
            _ => "metrics are one JSON object, model → figures".to_owned(),
        };
        return Err(CliError::message(Code::Pipeline, "there are no metrics to compare", Some(help)));
    }
    let baseline = args.baseline.as_deref().map_or(Baseline::FirstOfModel, Baseline::parse);
    if !baseline.is_among(&rows) {
        let models: Vec<String> = rows.iter().map(|r| format!("{}/{}", r.variant, r.model)).collect();
        let message = format!("no metrics of `{}`", args.baseline.as_deref().unwrap_or_default());
        return Err(CliError::message(Code::Pipeline, message, Some(format!("there are {}", models.join(", ")))));
    }
    let compared = match args.resamples {
        0 => Vec::new(),
        resamples => differences::compare(&rows, &ranks, &baseline, resamples, args.seed),
    };
    if args.json {
        println!("{}", as_json(&rows, &compared));
    } else {
        println!("{}", metrics::table(&rows, args.baseline.is_none()));
        if !compared.is_empty() {
            println!("\n{}", differences::table(&rows, &compared));
        }
    }
    Ok(Code::Ok)
}

/// What a program of the user's own wrote has no type; a file called metrics.json is taken at its word.
fn shows(output: &grlm_stages::Output) -> bool {
    output.artifact == Artifact::Metrics || output.file == "metrics.json"
}

type Evaluated = (String, metrics::Figures, Option<Ranks>);

/// The models that a stage evaluated, and each user's rank where it wrote them.
///
/// # Errors
/// A text that says which output is wrong, and how.
fn read(store: &Store, stage: &Stage, done: &Done) -> Result<Vec<Evaluated>, String> {
    let stored = |output: &grlm_stages::Output| {
        let path = store.path_of(&done.outputs.get(output.name.as_ref())?.digest);
        let place = path.display().to_string();
        let file = output.file.to_string();
        // Nobody knows a blob by its name in the store.
        Some((path, move |message: String| message.replace(&place, &file)))
    };
    let mut ranks: HashMap<String, Ranks> = HashMap::new();
    for (path, named) in stage.outputs.iter().filter(|o| o.artifact == Artifact::PerUser).filter_map(stored) {
        ranks.extend(differences::read_ranks(&path).map_err(named)?);
    }
    let mut models = Vec::new();
    for (path, named) in stage.outputs.iter().filter(|o| shows(o)).filter_map(stored) {
        for (model, figures) in metrics::read(&path).map_err(named)? {
            let ranks = ranks.remove(&model);
            models.push((model, figures, ranks));
        }
    }
    Ok(models)
}

fn as_json(rows: &[Row], compared: &[Compared]) -> serde_json::Value {
    let all = rows.iter().enumerate().map(|(place, row)| {
        let mut value = json!({"variant": row.variant, "stage": row.stage, "model": row.model, "metrics": row.figures});
        if let Some(compared) = compared.iter().find(|c| c.row == place) {
            value["comparison"] = differences::json(rows, compared);
        }
        value
    });
    serde_json::Value::Array(all.collect())
}
