//! When things reach the disk.
//!
//! A killed process loses nothing: what was written is in the kernel. A power cut is another matter, and an fsync costs
//! milliseconds, more than a small stage. So:
//!
//! * A blob of 1 MiB or more is synced before it is renamed into place.
//! * A stage that ran for half a second or more is on disk, blobs and record, when `publish` returns.
//! * Quicker stages are synced in groups: by the first `publish` that comes a second or more after the oldest of them,
//!   and by [`Store::sync`](crate::Store::sync), which the end of every run calls. A power cut before that may cost
//!   them, which means that they run again.
//! * Nothing wrong is ever believed: a record carries its own checksum, and the signature of a blob that was not known
//!   to be on disk counts only in the boot that wrote it, so after a power cut such a blob is hashed before it is used.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Result, StoreError};

/// Files from this size on are synced at once: the call costs little beside writing them.
pub(crate) const SYNC_AT_ONCE: u64 = 1 << 20;
/// Stages from this duration on are synced before their record is published.
pub(crate) const SYNC_STAGE_MS: u64 = 500;
const GROUP_FOR: Duration = Duration::from_secs(1);
/// Beyond this many files one sync of the whole file system is cheaper.
const SYNC_ALL_FROM: usize = 512;
/// fsyncs in flight together share the journal's commits.
const THREADS: usize = 8;

/// Paths that were placed and are not yet known to be on disk.
#[derive(Default)]
pub(crate) struct Pending {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    paths: Vec<PathBuf>,
    since: Option<Instant>,
}

impl Pending {
    pub fn defer(&self, path: PathBuf) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.since.get_or_insert_with(Instant::now);
        state.paths.push(path);
    }

    pub fn is_due(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.since.is_some_and(|since| since.elapsed() >= GROUP_FOR)
    }

    /// Syncs what was deferred before the call. On failure the paths stay pending.
    pub fn flush(&self, root: &Path) -> Result<()> {
        let taken = std::mem::take(&mut *self.state.lock().unwrap_or_else(PoisonError::into_inner));
        if taken.paths.is_empty() {
            return Ok(());
        }
        let outcome = if taken.paths.len() >= SYNC_ALL_FROM { sync_file_system(root) } else { sync_each(&taken.paths) };
        if outcome.is_err() {
            taken.paths.into_iter().for_each(|path| self.defer(path));
        }
        outcome
    }
}

fn sync_file_system(root: &Path) -> Result<()> {
    let folder = File::open(root).map_err(StoreError::while_doing("open", root))?;
    rustix::fs::syncfs(&folder).map_err(StoreError::while_doing("sync", root))?;
    crate::steps::synced(root);
    Ok(())
}

fn sync_each(paths: &[PathBuf]) -> Result<()> {
    let folders: BTreeSet<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    // Files first: once they are on disk their folders mostly are too, and cost nothing.
    for group in [paths.iter().map(PathBuf::as_path).collect::<Vec<_>>(), folders.into_iter().collect()] {
        std::thread::scope(|scope| {
            let workers: Vec<_> = group
                .chunks(group.len().div_ceil(THREADS).max(1))
                .map(|chunk| scope.spawn(move || chunk.iter().try_for_each(|path| sync_path(path))))
                .collect();
            workers.into_iter().try_for_each(|worker| {
                worker.join().unwrap_or_else(|_| {
                    Err(StoreError::io("sync", Path::new("store"), io::Error::other("a thread died")))
                })
            })
        })?;
    }
    Ok(())
}

/// Syncs a file or folder; one that is gone (collected, quarantined) needs no syncing.
pub(crate) fn sync_path(path: &Path) -> Result<()> {
    match File::open(path).and_then(|file| file.sync_all()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("sync", path, error)),
        Err(_) => Ok(()),
        Ok(()) => {
            crate::steps::synced(path);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushing_empties_the_list_and_forgives_files_that_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let pending = Pending::default();
        for i in 0..20 {
            let path = dir.path().join(i.to_string());
            if i % 3 > 0 {
                std::fs::write(&path, "x").unwrap();
            }
            pending.defer(path);
        }
        pending.flush(dir.path()).unwrap();
        assert!(pending.state.lock().unwrap().paths.is_empty());
        for i in 0..SYNC_ALL_FROM {
            pending.defer(dir.path().join(i.to_string()));
        }
        pending.flush(dir.path()).unwrap();
    }
}
