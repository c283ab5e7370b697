//! The named steps of keeping rows, of publication and of collection, at each of which a fault may be asked for: how the promises of this
//! crate are tested on the real program. Without the variables below a step costs one atomic load.
//!
//! | variable | meaning |
//! |---|---|
//! | `GRLM_FAULT=Step:visit:kind` | at the `visit`th time (from 1) that this process reaches `Step` (or `Any`): `kill` ends the process as `kill -9` would, `stop` suspends it, `eio` and `enospc` make the step fail |
//! | `GRLM_FAULT_STRUCK=FILE` | when the fault strikes, a line is appended to `FILE`: one that never does tests nothing |
//! | `GRLM_FAULT_SYNCED=FILE` | the paths of files and folders that were synced are appended to `FILE`, so that a test of power cuts knows what the disk must still have |
//! | `GRLM_FAULT_FRESH=SECONDS` | stands for [`crate::FRESH`], so that a test need not wait for it |
//! | `GRLM_FAULT_BOOT=TEXT` | this process believes to run in another boot: what comes after a power cut |

use std::env;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use crate::{Result, StoreError};

/// A point between two effects on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    RowsAppended,
    RowsSynced,
    Sealed,
    Hashed,
    BlobSynced,
    BlobPlaced,
    BlobRemembered,
    FolderFilesPlaced,
    ManifestStaged,
    FolderPlaced,
    RecordStaged,
    RecordSynced,
    RecordPlaced,
    ScratchCleared,
    OutPlaced,
    RecordCondemned,
    BlobCondemned,
    TrashEmptied,
}

impl Step {
    /// In the order in which a worker that keeps rows, a publication, and then a collection, reach them.
    pub const ALL: [Step; 18] = [
        Step::RowsAppended,
        Step::RowsSynced,
        Step::Sealed,
        Step::Hashed,
        Step::BlobSynced,
        Step::BlobPlaced,
        Step::BlobRemembered,
        Step::FolderFilesPlaced,
        Step::ManifestStaged,
        Step::FolderPlaced,
        Step::RecordStaged,
        Step::RecordSynced,
        Step::RecordPlaced,
        Step::ScratchCleared,
        Step::OutPlaced,
        Step::RecordCondemned,
        Step::BlobCondemned,
        Step::TrashEmptied,
    ];
}

struct Fault {
    /// `None` is any step.
    step: Option<String>,
    visit: u32,
    kind: Kind,
    visits: Mutex<u32>,
}

#[derive(Clone, Copy)]
enum Kind {
    Kill,
    Stop,
    Fail(i32),
}

fn fault() -> Option<&'static Fault> {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    FAULT.get_or_init(|| parse(&env::var("GRLM_FAULT").ok()?)).as_ref()
}

fn parse(text: &str) -> Option<Fault> {
    let mut parts = text.split(':');
    let (step, visit, kind) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
    let kind = match kind {
        "kill" => Kind::Kill,
        "stop" => Kind::Stop,
        "eio" => Kind::Fail(libc::EIO),
        "enospc" => Kind::Fail(libc::ENOSPC),
        _ => return None,
    };
    Some(Fault { step: (step != "Any").then(|| step.to_owned()), visit, kind, visits: Mutex::new(0) })
}

/// Says that `step` is reached, about to go on with `path`.
///
/// # Errors
/// Only the failure that was asked for.
pub(crate) fn reach(step: Step, path: &Path) -> Result<()> {
    match fault() {
        None => Ok(()),
        Some(fault) => fault.strike(step).map_err(StoreError::while_doing("go on with", path)),
    }
}

impl Fault {
    fn strike(&self, step: Step) -> io::Result<()> {
        if self.step.as_ref().is_some_and(|wanted| *wanted != format!("{step:?}")) {
            return Ok(());
        }
        let Ok(mut visits) = self.visits.lock() else { return Ok(()) };
        *visits += 1;
        if *visits != self.visit {
            return Ok(());
        }
        if let Some(mut log) = env::var_os("GRLM_FAULT_STRUCK").and_then(|path| appending(path.as_ref())) {
            let _ = writeln!(log, "{step:?}");
        }
        let signal = match self.kind {
            Kind::Fail(code) => return Err(io::Error::from_raw_os_error(code)),
            Kind::Kill => rustix::process::Signal::KILL,
            Kind::Stop => rustix::process::Signal::STOP,
        };
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        Ok(())
    }
}

/// Says that the data of `path` are on disk; for a folder, its names.
pub fn synced(path: &Path) {
    static LOG: OnceLock<Option<Mutex<std::fs::File>>> = OnceLock::new();
    let log = LOG.get_or_init(|| appending(env::var_os("GRLM_FAULT_SYNCED")?.as_ref()).map(Mutex::new));
    if let Some(Ok(mut log)) = log.as_ref().map(Mutex::lock) {
        let _ = writeln!(log, "{}", path.display());
    }
}

fn appending(path: &Path) -> Option<std::fs::File> {
    std::fs::OpenOptions::new().append(true).create(true).open(path).ok()
}

pub(crate) fn claimed_fresh() -> Option<u64> {
    static FRESH: OnceLock<Option<u64>> = OnceLock::new();
    *FRESH.get_or_init(|| env::var("GRLM_FAULT_FRESH").ok()?.parse().ok())
}

pub(crate) fn claimed_boot() -> Option<String> {
    env::var("GRLM_FAULT_BOOT").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_at_its_step_and_visit_once() {
        let fault = parse("BlobPlaced:2:enospc").unwrap();
        let failed: Vec<bool> = [Step::BlobPlaced, Step::Hashed, Step::BlobPlaced, Step::BlobPlaced]
            .map(|step| fault.strike(step).is_err())
            .to_vec();
        assert_eq!(failed, [false, false, true, false]);
        let any = parse("Any:2:eio").unwrap();
        assert!(any.strike(Step::Sealed).is_ok());
        assert_eq!(any.strike(Step::Hashed).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(parse("Sealed:1:explode").is_none() && parse("Sealed").is_none());
    }
}
