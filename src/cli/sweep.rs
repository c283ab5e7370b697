//! `grlm sweep`: several variants as one graph, in which equal stages run once.

use std::path::PathBuf;

use super::{
    Global, plan,
    request::{self, Part},
    run::{How, carry_out},
};
use crate::{
    error::CliError,
    exit_codes::Code,
    pipeline::{Pipeline, PipelineFile},
};

/// Run several variants as one graph; what they share runs once
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    several: Several,
    #[command(flatten)]
    how: How,
    /// Only say what would run
    #[arg(long, short = 'n')]
    dry_run: bool,
}

/// A pipeline file and some of its variants
#[derive(Debug, Clone, clap::Args)]
pub struct Several {
    /// The pipeline file
    pub file: PathBuf,
    /// Variants, cells, matrices (all of their cells) and `default`; without any, everything the file has
    pub variants: Vec<String>,
    /// Another value for one path, in every variant; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = request::assignment)]
    pub set: Vec<(String, String)>,
}

impl Several {
    /// Loads every variant that is asked for, in that order.
    pub fn load(&self) -> Result<Vec<Pipeline>, CliError> {
        Ok(PipelineFile::read(&self.file)?.load_all(&self.variants, &self.set)?)
    }
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let work = request::work(args.several.load()?, &Part::default())?;
    if args.dry_run {
        return plan::show(&work, &args.how.devices, global, false);
    }
    carry_out(&work, &args.how, global, None)
}
