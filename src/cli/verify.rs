//! `grlm verify`: reads the whole store again, and says what is wrong.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use grlm_cache::{Access, Flaw};

use super::{Global, request};
use crate::{error::CliError, events::human_bytes, exit_codes::Code};

/// Read every result again, and say which are not what they should be
#[derive(Debug, clap::Args)]
pub struct Args {
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let store = request::open_store(global, Access::Read)
        .and_then(|read| request::open_store(global, Access::Write).or(Ok(read)))?;
    let told = Mutex::new(Instant::now());
    let most = AtomicU64::new(0);
    let progress = |done: u64, total: u64| {
        let done = most.fetch_max(done, Ordering::Relaxed).max(done);
        let Ok(mut last) = told.try_lock() else { return };
        if last.elapsed().as_secs() >= 2 && !global.quiet {
            *last = Instant::now();
            eprintln!("read {} of {}", human_bytes(done), human_bytes(total));
        }
    };
    let verified = store.verify(&progress)?;
    let code = if verified.findings.is_empty() { Code::Ok } else { Code::Check };
    if args.json {
        println!("{}", serde_json::to_string(&verified).unwrap_or_default());
        return Ok(code);
    }
    for finding in &verified.findings {
        match &finding.flaw {
            Flaw::Record { name } => println!("record {name} is damaged, so it does not count; `grlm gc` removes it"),
            Flaw::Damaged { digest, moved } => {
                let and = if *moved { "; it was moved to quarantine/" } else { "" };
                println!("blob {} is not what its name says{and}", digest.short());
            }
            Flaw::Missing { digest } => println!("blob {} is missing", digest.short()),
            Flaw::Rows { namespace, damaged, left_out } => {
                let and = if *left_out { ", and left out from now on" } else { "" };
                println!("rows of {namespace}: {damaged} damaged{and}; they are computed again when they are needed");
            }
        }
        let forgotten = if finding.forgotten { "was forgotten, and " } else { "" };
        for (stage, key) in &finding.spoils {
            println!("  {stage} ({}) {forgotten}runs again when it is needed", key.0.short());
        }
    }
    println!(
        "{} records, {} blobs, {} rows, {}: {}",
        verified.records,
        verified.blobs,
        verified.rows,
        human_bytes(verified.bytes),
        match verified.findings.len() {
            0 => "all as they should be".to_owned(),
            n => format!("{n} not as they should be"),
        }
    );
    Ok(code)
}
