//! `grlm pin` and `grlm unpin`: results that stay whatever their age.

use std::{collections::BTreeSet, path::PathBuf};

use comfy_table::{Table, presets};
use grlm_cache::{Access, ActionKey, StoreError};

use super::{
    Global,
    request::{self, Part, Selected},
};
use crate::{
    engine::foresee::{Foreseen, foresee},
    error::CliError,
    exit_codes::Code,
    journal::{CalendarStyle, utc},
};

/// Keep a pipeline's present results under a name, whatever `grlm gc` is told; without arguments, list what is kept
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to call them
    #[arg(requires = "file")]
    name: Option<String>,
    /// The pipeline file
    file: Option<PathBuf>,
    /// A variant, or a cell of a matrix
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Another value for one path; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = request::assignment)]
    set: Vec<(String, String)>,
}

/// Let go of a name; what it kept stays until it is collected
#[derive(Debug, clap::Args)]
pub struct UnpinArgs {
    name: String,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let (Some(name), Some(file)) = (&args.name, &args.file) else { return list(global) };
    let selected = Selected { file: file.clone(), variant: args.variant.clone(), set: args.set.clone() };
    let work = request::work(vec![selected.load()?], &Part::default())?;
    let store = request::open_store(global, Access::Write)?;
    let plan = foresee(&store, &work)?;
    let keys: BTreeSet<ActionKey> = plan
        .iter()
        .filter_map(|foreseen| if let Foreseen::UpToDate(done) = foreseen { Some(done.key) } else { None })
        .collect();
    if keys.is_empty() {
        let help = "run it first; `grlm plan` says what is missing".to_owned();
        return Err(CliError::message(Code::Pipeline, "this pipeline has no results to keep", Some(help)));
    }
    let missing = plan.len() - keys.len().min(plan.len());
    let before = store.pins()?.into_iter().find(|pin| pin.name == *name);
    let pin = store.pin(name, &work.title(0), keys)?;
    println!("`{name}` keeps {} of {}", results(pin.actions.len()), pin.of);
    if let Some(before) = before.filter(|before| !before.actions.is_subset(&pin.actions)) {
        eprintln!(
            "it kept {} of {} before; what is not among the new ones is let go",
            results(before.actions.len()),
            before.of
        );
    }
    if missing > 0 {
        eprintln!("{missing} stages are not up to date, so they are not kept");
    }
    Ok(Code::Ok)
}

fn results(number: usize) -> String {
    if number == 1 { "1 result".to_owned() } else { format!("{number} results") }
}

pub fn unpin(args: &UnpinArgs, global: &Global) -> Result<Code, CliError> {
    request::open_store(global, Access::Write)?.unpin(&args.name).map_err(|error| match error {
        StoreError::Unknown { .. } => CliError::message(Code::Usage, error.to_string(), error.help()),
        error => error.into(),
    })?;
    Ok(Code::Ok)
}

fn list(global: &Global) -> Result<Code, CliError> {
    let pins = request::open_store(global, Access::Read)?.pins()?;
    if pins.is_empty() {
        eprintln!("nothing is pinned");
        return Ok(Code::Ok);
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["name", "of", "results", "since (UTC)"]);
    for pin in pins {
        let since = utc(pin.since_ms / 1000, &CalendarStyle::Readable);
        table.add_row([pin.name, pin.of, pin.actions.len().to_string(), since]);
    }
    println!("{}", table.trim_fmt());
    Ok(Code::Ok)
}
