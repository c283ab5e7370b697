//! `grlm du`: what the store holds, by pipeline and stage, and the rows by namespace.

use comfy_table::{CellAlignment, Table, presets};
use grlm_cache::{Access, Usage};

use super::{Global, request};
use crate::{
    error::CliError,
    events::human_bytes,
    exit_codes::Code,
    journal::{CalendarStyle, utc},
};

/// Show what the store holds, by pipeline and stage
#[derive(Debug, clap::Args)]
pub struct Args {
    /// As JSON, in bytes
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    // Writing lets it remember the size; a store that may only be read is counted all the same.
    let store = request::open_store(global, Access::Read)
        .and_then(|read| request::open_store(global, Access::Write).or(Ok(read)))?;
    let usage = store.usage()?;
    if args.json {
        println!("{}", serde_json::to_string(&usage).unwrap_or_default());
        return Ok(Code::Ok);
    }
    if !usage.stages.is_empty() {
        println!("{}\n", stages(&usage).trim_fmt());
    }
    if !usage.namespaces.is_empty() {
        println!("{}\n", namespaces(&usage).trim_fmt());
    }
    let parts = [
        ("results", usage.blobs - usage.unreferenced),
        ("blobs that no record needs", usage.unreferenced),
        ("records", usage.records),
        ("rows", usage.rows),
        ("runs and their logs", usage.runs),
        ("unfinished work", usage.scratch),
        ("quarantine", usage.quarantine),
        ("indexes and the rest", usage.rest),
    ];
    for (what, bytes) in parts.into_iter().filter(|(_, bytes)| *bytes > 0) {
        println!("{:>11}  {what}", human_bytes(bytes));
    }
    let (limit, chosen) = store.limit();
    let whose = if chosen { "limit" } else { "default limit" };
    println!("{:>11}  in all; {whose} {}", human_bytes(usage.total()), human_bytes(limit));
    Ok(Code::Ok)
}

fn namespaces(usage: &Usage) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["rows of", "size", "last used (UTC)"]);
    for rows in &usage.namespaces {
        let used = utc(rows.used_ms / 1000, &CalendarStyle::Readable);
        table.add_row([rows.namespace.clone(), human_bytes(rows.bytes), used]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn stages(usage: &Usage) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["pipeline", "stage", "results", "size", "its own", "last used (UTC)"]);
    for stage in &usage.stages {
        table.add_row([
            stage.pipeline.clone(),
            stage.stage.clone(),
            stage.actions.to_string(),
            human_bytes(stage.bytes),
            human_bytes(stage.own_bytes),
            utc(stage.used_ms / 1000, &CalendarStyle::Readable),
        ]);
    }
    for column in 2..5 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
