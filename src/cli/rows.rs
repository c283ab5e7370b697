//! `grlm rows`: what is kept of single rows, and taking it elsewhere.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use comfy_table::{CellAlignment, Table, presets};
use grlm_cache::{
    Access, Digest,
    rows::{Entry, Namespace, RowStore},
};
use serde_json::json;

use super::{Global, request::open_store};
use crate::{error::CliError, events::human_bytes, exit_codes::Code};

/// Look at the results kept for single rows, and move them
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: RowsVerb,
}

#[derive(Debug, clap::Subcommand)]
enum RowsVerb {
    /// List the namespaces and what they hold
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// List a namespace's rows by key, or show one row's result
    Show {
        namespace: String,
        /// The first digits of a row's key
        key: Option<String>,
        /// Rows that failed, and why
        #[arg(long, conflicts_with = "key")]
        failed: bool,
    },
    /// Forget the results of a namespace: they are computed again when they are needed
    Drop {
        namespace: String,
        /// Forget only which rows failed, and why
        #[arg(long)]
        failed: bool,
    },
    /// Write results to a file, to take them to another store
    Export {
        /// The file; `-` is the standard output
        file: PathBuf,
        /// These namespaces; by default all
        namespaces: Vec<String>,
    },
    /// Take in the results of an export
    Import {
        /// The file; `-` is the standard input
        file: PathBuf,
    },
    /// Merge the segments of a namespace, and leave out what is there twice or damaged
    Compact {
        /// These namespaces; by default all
        namespaces: Vec<String>,
    },
    /// Read every row and say what is damaged
    Verify {
        /// These namespaces; by default all
        namespaces: Vec<String>,
    },
}

/// Bytes of a result that are shown when they are no text.
const SHOWN: usize = 64;

pub fn run(args: &Args, global: &Global) -> Result<Code, CliError> {
    let open = |access| Ok::<RowStore, CliError>(open_store(global, access)?.rows());
    match &args.verb {
        RowsVerb::Ls { json } => list(&open(Access::Read)?, *json),
        RowsVerb::Show { namespace, key, failed } => {
            let mut rows = existing(&open(Access::Read)?, namespace)?;
            match key {
                Some(key) => show_one(&mut rows, key),
                None => show_all(&mut rows, *failed),
            }
        }
        RowsVerb::Drop { namespace, failed } => {
            let store = open(Access::Write)?;
            let all = match failed {
                true => existing(&store, namespace)?.drop_failures()?,
                false => existing(&store, namespace).and_then(|_| Ok(store.drop_namespace(namespace)?))?,
            };
            if all {
                return Ok(Code::Ok);
            }
            let message = format!("a run uses `{namespace}` at this moment: what it writes stays");
            Err(CliError::message(Code::Store, message, Some("wait for that run, then again".into())))
        }
        RowsVerb::Export { file, namespaces } => export(&open(Access::Read)?, file, namespaces, global.quiet),
        RowsVerb::Import { file } => import(&open(Access::Write)?, file, global.quiet),
        RowsVerb::Compact { namespaces } => {
            let store = open(Access::Write)?;
            for name in chosen(&store, namespaces)? {
                let merged = existing(&store, &name)?.compact()?;
                println!("{name}: {merged} segments merged");
            }
            Ok(Code::Ok)
        }
        RowsVerb::Verify { namespaces } => {
            let store = open(Access::Read)?;
            let mut code = Code::Ok;
            for name in chosen(&store, namespaces)? {
                let (records, damaged) = existing(&store, &name)?.verify()?;
                println!("{name}: {records} records, {damaged} damaged");
                if damaged > 0 {
                    code = Code::Check;
                }
            }
            Ok(code)
        }
    }
}

fn existing(store: &RowStore, name: &str) -> Result<Namespace, CliError> {
    let names = store.namespaces()?;
    if names.iter().any(|n| n == name) {
        return Ok(store.namespace(name)?);
    }
    let help = match names.is_empty() {
        true => "no rows are kept in this store".to_owned(),
        false => format!("there are {}", names.join(", ")),
    };
    Err(CliError::message(Code::Usage, format!("there is no namespace `{name}`"), Some(help)))
}

fn chosen(store: &RowStore, names: &[String]) -> Result<Vec<String>, CliError> {
    if names.is_empty() {
        return Ok(store.namespaces()?);
    }
    names.iter().try_for_each(|name| existing(store, name).map(drop))?;
    Ok(names.to_vec())
}

fn list(store: &RowStore, as_json: bool) -> Result<Code, CliError> {
    let mut all = Vec::new();
    for name in store.namespaces()? {
        let stats = store.namespace(&name)?.stats()?;
        all.push((name, stats));
    }
    if as_json {
        let all: Vec<_> = all
            .iter()
            .map(|(name, s)| {
                json!({
                    "namespace": name, "rows": s.results, "failed": s.failures, "segments": s.segments,
                    "bytes": s.bytes, "payload": s.payload,
                })
            })
            .collect();
        println!("{}", serde_json::Value::Array(all));
        return Ok(Code::Ok);
    }
    if all.is_empty() {
        println!("no rows are kept");
        return Ok(Code::Ok);
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["namespace", "rows", "failed", "segments", "size"]);
    for (name, s) in all {
        let counts = [s.results, s.failures, s.segments].map(|n| n.to_string());
        table.add_row([&[name][..], &counts, &[human_bytes(s.bytes)]].concat());
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
    Ok(Code::Ok)
}

fn show_all(rows: &mut Namespace, failed: bool) -> Result<Code, CliError> {
    let mut out = BufWriter::new(io::stdout().lock());
    for key in rows.keys(failed)? {
        let line = match rows.entry(&key)? {
            Some(Entry::Failure(message)) => format!("{}  {message}", key.short()),
            Some(Entry::Result(bytes)) => format!("{}  {}", key.short(), in_one_line(&bytes)),
            None => format!("{}  damaged", key.short()),
        };
        if writeln!(out, "{line}").is_err() {
            break;
        }
    }
    let _ = out.flush();
    Ok(Code::Ok)
}

fn in_one_line(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) && text.chars().count() <= SHOWN => text.to_owned(),
        Ok(text) if !text.chars().take(SHOWN).any(char::is_control) => {
            format!("{}…", text.chars().take(SHOWN).collect::<String>())
        }
        _ => human_bytes(bytes.len() as u64),
    }
}

/// Writes the result as it is: a redirect gives the very bytes.
fn show_one(rows: &mut Namespace, prefix: &str) -> Result<Code, CliError> {
    let refuse = |message: String| {
        CliError::message(Code::Usage, message, Some("`grlm rows show NAMESPACE` lists the keys".into()))
    };
    let all: Vec<Digest> = [rows.keys(false)?, rows.keys(true)?].concat();
    let mut found = all.iter().filter(|key| key.hex().starts_with(prefix));
    let Some(key) = found.next() else { return Err(refuse(format!("no row's key begins with `{prefix}`"))) };
    if found.next().is_some() {
        return Err(refuse(format!("several rows' keys begin with `{prefix}`")));
    }
    match rows.entry(key)? {
        Some(Entry::Result(bytes)) => {
            let mut out = io::stdout().lock();
            let end: &[u8] = if std::str::from_utf8(&bytes).is_ok() && !bytes.ends_with(b"\n") { b"\n" } else { b"" };
            let _ = out.write_all(&bytes).and_then(|()| out.write_all(end));
            Ok(Code::Ok)
        }
        Some(Entry::Failure(message)) => {
            println!("failed: {message}");
            Ok(Code::Ok)
        }
        None => Err(CliError::message(
            Code::Check,
            format!("row {} is damaged", key.short()),
            Some("it is computed again when it is needed".into()),
        )),
    }
}

fn is_standard(file: &Path) -> bool {
    file.as_os_str() == "-"
}

fn export(store: &RowStore, file: &Path, namespaces: &[String], quiet: bool) -> Result<Code, CliError> {
    let names = chosen(store, namespaces)?;
    let failed = |action: &str, e: &io::Error| {
        CliError::message(Code::Store, format!("cannot {action} {}: {e}", file.display()), None)
    };
    let count = if is_standard(file) {
        store.export(&names, &mut BufWriter::new(io::stdout().lock()), file)?
    } else {
        // Beside the target, so that what is at its path is a whole export or none.
        let folder = file.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // As any other file that a program writes: readable as the umask says, not by its owner alone.
        let open = fs::Permissions::from_mode(0o666);
        let staged = tempfile::Builder::new().permissions(open).tempfile_in(folder);
        let staged = staged.map_err(|e| failed("create", &e))?;
        let count = store.export(&names, &mut BufWriter::with_capacity(1 << 20, staged.as_file()), file)?;
        staged.as_file().sync_all().map_err(|e| failed("write", &e))?;
        staged.persist(file).map_err(|e| failed("write", &e.error))?;
        count
    };
    if !quiet {
        eprintln!("{count} rows of {}", names.join(", "));
    }
    Ok(Code::Ok)
}

fn import(store: &RowStore, file: &Path, quiet: bool) -> Result<Code, CliError> {
    let imported = if is_standard(file) {
        store.import(&mut BufReader::new(io::stdin().lock()), file)?
    } else {
        let open = File::open(file)
            .map_err(|e| CliError::message(Code::Pipeline, format!("cannot open {}: {e}", file.display()), None))?;
        store.import(&mut BufReader::with_capacity(1 << 20, open), file)?
    };
    if !quiet {
        eprintln!("{} new rows, {} were there", imported.new, imported.known);
    }
    Ok(Code::Ok)
}
