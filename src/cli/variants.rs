//! `grlm variants`: the variants of a pipeline file.

use std::path::PathBuf;

use comfy_table::{ContentArrangement, Table, presets};

use crate::{error::CliError, exit_codes::Code, pipeline::PipelineFile};

/// List the variants of a pipeline, matrix cells one by one
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pipeline file
    file: PathBuf,
}

pub fn run(args: &Args) -> Result<Code, CliError> {
    let file = PipelineFile::read(&args.file)?;
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.add_row(["default", "The pipeline as written."]);
    for (name, description) in file.variants()? {
        // One line each, however the file wraps it.
        let words: Vec<&str> = description.unwrap_or_default().split_whitespace().collect();
        table.add_row([name, words.join(" ")]);
    }
    if let Some(names) = table.column_mut(0) {
        names.set_padding((0, 1));
    }
    println!("{}", table.trim_fmt());
    Ok(Code::Ok)
}
