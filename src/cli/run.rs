//! `grlm run`: brings a pipeline up to date.

use std::path::{Path, PathBuf};

use grlm_cache::Access;
use grlm_stages::Artifact;

use super::{
    Global, plan,
    request::{self, Part, Selected},
};
use crate::{
    device,
    engine::{
        run::{self, Ended, Options},
        work::Work,
    },
    error::CliError,
    events::Outcome,
    exit_codes::Code,
    metrics::{self, Row},
    progress::{Json, Plain, Quiet, Reporter},
};

/// Run what is not up to date, and nothing else
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    selected: Selected,
    #[command(flatten)]
    part: Part,
    #[command(flatten)]
    how: How,
    /// Only say what would run, as `grlm plan` does
    #[arg(long, short = 'n')]
    dry_run: bool,
}

/// How stages run
#[derive(Debug, Clone, clap::Args)]
pub struct How {
    /// Where results are shown
    #[arg(long, default_value = "out", value_name = "FOLDER")]
    pub out: PathBuf,
    /// After a failure, finish what does not depend on it
    #[arg(long)]
    pub keep_going: bool,
    /// GPUs to use: `0,2`, `none`, or made-up ones, `sim:8x80GiB`; by default all that are found
    #[arg(long, value_name = "DEVICES", default_value = "all")]
    pub devices: device::Selection,
    /// How to tell what happens
    #[arg(long, value_enum, default_value = "plain")]
    pub message_format: MessageFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MessageFormat {
    /// Lines on stderr
    Plain,
    /// One JSON object an event on stdout
    Json,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let pipeline = args.selected.load()?;
    let work = request::work(vec![pipeline], &args.part)?;
    if args.dry_run {
        return plan::show(&work, global, false);
    }
    carry_out(&work, &args.how, global)
}

/// Runs the work and shows its metrics.
pub fn carry_out(work: &Work, how: &How, global: &Global) -> Result<Code, CliError> {
    let machine = request::machine(&how.devices, work)?;
    request::check_simulated(&machine, work)?;
    let store = request::open_store(global, Access::Write)?;
    let options = Options { out: how.out.clone(), keep_going: how.keep_going, command: std::env::args().collect() };
    let mut reporter: Box<dyn Reporter> = match how.message_format {
        MessageFormat::Json => Box::new(Json),
        MessageFormat::Plain if global.quiet => Box::new(Quiet),
        MessageFormat::Plain => Box::new(Plain::default()),
    };
    let ended = run::run(store, work, machine, &options, reporter.as_mut())?;
    if ended.outcome == Outcome::Succeeded && !global.quiet && how.message_format == MessageFormat::Plain {
        show_metrics(work, &ended, &how.out);
    }
    Ok(match ended.outcome {
        Outcome::Succeeded => Code::Ok,
        Outcome::Failed => Code::StageFailed,
        Outcome::Interrupted => Code::Interrupted,
    })
}

/// The table at the end of a run, and where the files are.
fn show_metrics(work: &Work, ended: &Ended, out: &Path) {
    let mut rows = Vec::new();
    for (id, node) in work.nodes.iter().enumerate() {
        if ended.results[id].is_none() {
            continue;
        }
        for place in &node.places {
            let pipeline = &work.pipelines[place.pipeline];
            let stage = &pipeline.stages[place.stage];
            for output in stage.outputs.iter().filter(|o| o.artifact == Artifact::Metrics) {
                let path = out.join(pipeline.out_name()).join(stage.name.as_str()).join(output.file.as_ref());
                for (model, figures) in metrics::read(&path).unwrap_or_default() {
                    let variant = pipeline.variant.clone().unwrap_or_else(|| "default".into());
                    rows.push(Row { variant, stage: stage.name.to_string(), model, figures });
                }
            }
        }
    }
    if !rows.is_empty() {
        println!("{}\n", metrics::table(&rows, false));
    }
    for pipeline in &work.pipelines {
        println!("results: {}", out.join(pipeline.out_name()).display());
    }
}
