//! `grlm run`: brings a pipeline up to date.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use grlm_cache::{Access, Store};
use grlm_stages::Artifact;

use super::{
    Global, plan,
    request::{self, Part, Selected},
};
use crate::{
    device,
    engine::{
        run::{self, Ended, Options},
        shortcut::{Memory, Request},
        work::Work,
    },
    error::CliError,
    events::{Outcome, human_bytes},
    exit_codes::Code,
    metrics::{self, Row},
    progress::{Fancy, Json, Plain, Quiet, Reporter},
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
    /// Call this run so, and keep its results whatever `grlm gc` is told, until `grlm unpin`
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// How to tell what happens
    #[arg(long, value_enum, default_value = "auto")]
    pub message_format: MessageFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MessageFormat {
    /// `fancy` on a terminal, `plain` elsewhere
    Auto,
    /// Running stages with their progress, redrawn in place, on stderr
    Fancy,
    /// Lines on stderr
    Plain,
    /// One JSON object an event on stdout
    Json,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let selection = args.selected.selection();
    let whole = Request { file: &args.selected.file, selection: &selection, out: &args.how.out };
    let whole = (args.part.is_everything() && !args.dry_run && args.how.name.is_none()).then_some(whole);
    if let Some(request) = &whole
        && let Some(code) = spared(request, &args.how, global)?
    {
        return Ok(code);
    }
    let pipeline = args.selected.load()?;
    let work = request::work(vec![pipeline], &args.part)?;
    if args.dry_run {
        return plan::show(&work, &args.how.devices, global, false);
    }
    carry_out(&work, &args.how, global, whole.as_ref())
}

/// The end of a run in which nothing changed since the last one; `None` if something did.
fn spared(request: &Request, how: &How, global: &Global) -> Result<Option<Code>, CliError> {
    let started = Instant::now();
    if !global.store.join("VERSION").exists() {
        return Ok(None);
    }
    let store = request::open_store(global, Access::Write)?;
    let Some(memory) = Memory::recall(&store, request) else { return Ok(None) };
    memory.report(&store, std::env::args().collect(), started, how.reporter(global).as_mut())?;
    if how.shows_results() {
        show_metrics(&memory.metrics, std::slice::from_ref(&memory.folder));
    }
    Ok(Some(Code::Ok))
}

impl How {
    fn reporter(&self, global: &Global) -> Box<dyn Reporter> {
        match self.message_format {
            MessageFormat::Json => Box::new(Json),
            _ if global.quiet => Box::new(Quiet),
            MessageFormat::Fancy => Box::new(Fancy::new()),
            MessageFormat::Auto if can_redraw() => Box::new(Fancy::new()),
            MessageFormat::Auto | MessageFormat::Plain => Box::new(Plain::default()),
        }
    }

    fn shows_results(&self) -> bool {
        self.message_format != MessageFormat::Json
    }
}

/// Runs the work and shows its metrics; `whole` is the request of a whole pipeline, to be remembered.
pub fn carry_out(work: &Work, how: &How, global: &Global, whole: Option<&Request>) -> Result<Code, CliError> {
    let machine = request::machine(&how.devices, work)?;
    request::check_simulated(&machine, work)?;
    let store = request::open_store(global, Access::Write)?;
    how.name.iter().try_for_each(|name| store.check_pin(name))?;
    let (out, name) = (how.out.clone(), how.name.clone());
    let options = Options { out, name, keep_going: how.keep_going, command: std::env::args().collect() };
    let ended = run::run(Arc::clone(&store), work, machine, &options, how.reporter(global).as_mut())?;
    if let Some(request) = whole {
        Memory::keep(&store, request, work, &ended);
    }
    if let Some(name) = &how.name {
        let keys = ended.results.iter().flatten().map(|done| done.key).collect();
        store.pin(name, &work.title(0), keys)?;
    }
    if ended.counts.ran > 0 && how.message_format != MessageFormat::Json {
        announce_size(&store);
    }
    if ended.outcome == Outcome::Succeeded && how.shows_results() {
        let folders: Vec<PathBuf> = work.pipelines.iter().map(|p| how.out.join(p.out_name())).collect();
        show_metrics(&metrics_of(work, &ended, &how.out), &folders);
    }
    Ok(match ended.outcome {
        Outcome::Succeeded => Code::Ok,
        Outcome::Failed => Code::StageFailed,
        Outcome::Interrupted => Code::Interrupted,
    })
}

/// Says when the store has outgrown its limit. Nothing is removed that the user did not ask for.
fn announce_size(store: &Store) {
    let (size, (limit, _)) = (store.size(), store.limit());
    if size > limit {
        let _ = writeln!(
            std::io::stderr(),
            "the store holds {}, more than its limit of {}: `grlm gc` removes what was not used for longest, `grlm gc --limit SIZE` changes the limit",
            human_bytes(size),
            human_bytes(limit)
        );
    }
}

/// Whether stderr is a terminal on which lines can be drawn anew.
fn can_redraw() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// The metrics that a run has, each with its variant and stage.
fn metrics_of(work: &Work, ended: &Ended, out: &Path) -> Vec<(String, String, PathBuf)> {
    let mut found = Vec::new();
    for (node, _) in work.nodes.iter().zip(&ended.results).filter(|(_, result)| result.is_some()) {
        for place in &node.places {
            let pipeline = &work.pipelines[place.pipeline];
            let stage = &pipeline.stages[place.stage];
            for output in stage.outputs.iter().filter(|o| o.artifact == Artifact::Metrics) {
                let path = out.join(pipeline.out_name()).join(stage.name.as_str()).join(output.file.as_ref());
                let variant = pipeline.variant.clone().unwrap_or_else(|| "default".into());
                found.push((variant, stage.name.to_string(), path));
            }
        }
    }
    found
}

/// The table at the end of a run, and where the files are.
fn show_metrics(found: &[(String, String, PathBuf)], folders: &[PathBuf]) {
    let mut rows = Vec::new();
    for (variant, stage, path) in found {
        for (model, figures) in metrics::read(path).unwrap_or_default() {
            rows.push(Row { variant: variant.clone(), stage: stage.clone(), model, figures });
        }
    }
    let mut text = String::new();
    if !rows.is_empty() {
        text = format!("{}\n\n", metrics::table(&rows, false));
    }
    for folder in folders {
        text.push_str(&format!("results: {}\n", folder.display()));
    }
    // The run has succeeded, whether or not anybody reads this (`grlm run … | head -1`).
    let _ = std::io::stdout().write_all(text.as_bytes());
}
