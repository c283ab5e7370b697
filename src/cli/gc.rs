//! `grlm gc`: makes the store smaller, and says what went.

use std::{collections::BTreeSet, time::Duration};

use comfy_table::{CellAlignment, Table, presets};
use grlm_cache::{Access, Collect, Collected, InUse, Store, StoreError};

use super::{Global, request};
use crate::{
    device::parse_bytes,
    engine::run::RunError,
    error::CliError,
    events::{human_bytes, now},
    exit_codes::Code,
    journal::{CalendarStyle, RunState, Runs, utc},
};

/// Remove what was not used for longest, until the store fits its limit; pins and what runs now stay
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The size that the store should have at most afterwards, as in `50GiB`; by default its limit
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_size: Option<u64>,
    /// Remove everything that was not used for this long, as in `30d` or `12h`
    #[arg(long, value_name = "TIME", value_parser = age)]
    max_age: Option<Duration>,
    /// Change the store's limit, for everyone who uses it, and collect to it
    #[arg(long, value_name = "SIZE", value_parser = size)]
    limit: Option<u64>,
    /// Only say what would go
    #[arg(long, short = 'n')]
    dry_run: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text).ok_or_else(|| format!("`{text}` is no size: expected one as in `50GiB`"))?;
    // A store of 50 bytes is nobody's wish.
    if text.trim() != "0" && text.trim().ends_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Err(format!("`{text}` has no unit: `{}GiB`, for example", text.trim()));
    }
    Ok(bytes)
}

fn age(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: expected one as in `30d`, `12h` or `90m`");
    let unit = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..unit].parse().map_err(|_| wrong())?;
    let seconds = match &text[unit..] {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(wrong()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

/// Results that are pinned, and since when the oldest run goes on.
pub fn in_use(store: &Store) -> Result<InUse, StoreError> {
    let actions: BTreeSet<_> = store.pins()?.into_iter().flat_map(|pin| pin.actions).collect();
    let runs = Runs::new(store.runs_dir());
    let running =
        runs.list().into_iter().filter_map(|id| runs.record(&id).ok()).filter(|record| match record.state() {
            RunState::Running => true,
            // Another machine's: its process cannot be seen, its journal can.
            RunState::Elsewhere => runs.is_fresh(&record.id),
            RunState::Ended(_) | RunState::Died => false,
        });
    let since = running.map(|record| (record.started * 1e3) as u64).min();
    Ok(InUse { actions, running_since_ms: since })
}

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    if !global.store.join("VERSION").exists() {
        return Err(StoreError::Absent { root: global.store.clone() }.into());
    }
    let store = request::open_store(global, Access::Write)?;
    if let Some(limit) = args.limit.filter(|_| !args.dry_run) {
        store.set_limit(limit)?;
    }
    let limit = args.limit.unwrap_or_else(|| store.limit().0);
    let max_bytes = args.max_size.or((args.max_age.is_none() || args.limit.is_some()).then_some(limit));
    let asked = || in_use(&store);
    let collect = Collect { max_bytes, max_age: args.max_age, dry_run: args.dry_run, in_use: &asked };
    let Some(done) = store.gc(&collect)? else {
        let help = "wait for it; it does not take long".to_owned();
        return Err(CliError::message(Code::Store, "another collection goes on in this store", Some(help)));
    };
    let journals = match args.max_age {
        Some(age) => old_journals(&Runs::new(store.runs_dir()), age, args.dry_run)?,
        None => 0,
    };
    if !args.dry_run {
        store.sweep_locks()?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&done).unwrap_or_default());
    } else {
        show(&done, args.dry_run, global.quiet);
        if journals > 0 {
            println!("{journals} journals of old runs {}", if args.dry_run { "would go" } else { "went too" });
        }
        if max_bytes.is_some_and(|max| done.left > max) {
            eprintln!("it is still larger than wanted: the rest is pinned, in use, or no result");
        }
    }
    Ok(Code::Ok)
}

/// Removes journals and logs of runs that ended that long ago and have no name. How many.
fn old_journals(runs: &Runs, age: Duration, dry_run: bool) -> Result<usize, CliError> {
    let mut removed = 0;
    for id in runs.list() {
        let Ok(record) = runs.record(&id) else { continue };
        let over = match record.state() {
            RunState::Running => false,
            RunState::Elsewhere => !runs.is_fresh(&id),
            RunState::Ended(_) | RunState::Died => true,
        };
        let end = record.ended.as_ref().map_or(record.started, |end| end.t);
        if over && record.name.is_none() && end + age.as_secs_f64() < now() {
            removed += 1;
            if !dry_run {
                runs.remove(&id).map_err(RunError::from)?;
            }
        }
    }
    Ok(removed)
}

fn show(done: &Collected, dry_run: bool, quiet: bool) {
    let nothing = done.actions.is_empty() && done.namespaces.is_empty();
    if !quiet && !nothing {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(["pipeline", "stage", "last used (UTC)", "frees"]);
        for gone in &done.actions {
            let used = utc(gone.used_ms / 1000, &CalendarStyle::Readable);
            table.add_row([gone.pipeline.clone(), gone.stage.clone(), used, human_bytes(gone.bytes)]);
        }
        for gone in &done.namespaces {
            let used = utc(gone.used_ms / 1000, &CalendarStyle::Readable);
            table.add_row(["rows of".to_owned(), gone.name.clone(), used, human_bytes(gone.bytes)]);
        }
        if let Some(column) = table.column_mut(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{}\n", table.trim_fmt());
    }
    let (would, holds) = if dry_run { ("would free", "would hold") } else { ("freed", "holds") };
    let results = match done.actions.len() {
        1 => "1 result".to_owned(),
        n => format!("{n} results"),
    };
    println!(
        "{would} {} ({results}; {} of leftovers); the store {holds} {}",
        human_bytes(done.bytes),
        human_bytes(done.garbage),
        human_bytes(done.left)
    );
    if done.spared > 0 {
        println!("{} older ones stay: pinned, or a run that goes on may need them", done.spared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_unit() {
        assert_eq!(["50GiB", "1B", "0", "0GiB"].map(|t| size(t).ok()), [50 << 30, 1, 0, 0].map(Some));
        assert!(["50", "0.4"].iter().all(|text| size(text).is_err_and(|e| e.contains("GiB`"))));
        assert!(["1.5", " 50 ", "many", ""].iter().all(|t| size(t).is_err()));
    }

    #[test]
    fn ages_are_read() {
        let seconds = |text: &str| age(text).map(|d| d.as_secs()).ok();
        assert_eq!(["30d", "12h", "90m", "5s", "2w"].map(seconds), [2_592_000, 43_200, 5400, 5, 1_209_600].map(Some));
        assert_eq!(["", "d", "30", "3y", "-1d", "99999999999999999w"].map(seconds), [None; 6]);
    }
}
