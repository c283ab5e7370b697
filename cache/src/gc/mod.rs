//! Making the store smaller, beside running pipelines: by age, by size (what was not used for longest goes first), and
//! always what nobody can use any more (blobs without a record, attempts of dead runs, quarantine).
//!
//! What stays whatever its age: what the caller names (pinned results, named runs), and what runs that go on may use.
//! Nobody waits for a collection, and it needs no word from a run but its start:
//!
//! * Whoever reuses a record dates it ([`Store::touch_record`]; at most once in [`FRESH`]), and whoever finds a blob
//!   that it was about to place touches that.
//! * A record is condemned by moving it to `trash/`, where its date is looked at again, and so are the runs. One that
//!   was used meanwhile, or that a run that goes on may have used, is put back. Who looks for it in between does not
//!   find it, and computes the same result again.
//! * A blob goes only if no record needs it and nothing has touched it since the collection began, or since the oldest
//!   run began that still goes on (its record may be on the way). It is condemned in the same manner.
//! * Rows go by whole namespaces ([`crate::rows`]), which count as used when a row came in or was looked up, and when a
//!   result that was made from them was used; what keeps such a result keeps them.
//! * A collection that dies leaves `trash/`, which the next one empties.

mod collection;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::Result;
use crate::digest::ActionKey;
use crate::inventory::remove_tree;
use crate::signature::now;
use crate::store::Store;
use collection::Collection;

/// A record dated within this long is not dated anew when it is used.
pub const FRESH: Duration = Duration::from_secs(600);
/// Dates that the kernel gives may lie this far behind its clock.
const TICK_MS: u64 = 50;
/// Checkpoints and partial work of actions that never finished stay this long.
pub const UNFINISHED_FOR: Duration = Duration::from_secs(14 * 24 * 3600);

/// What must stay.
#[derive(Clone, Debug, Default)]
pub struct InUse {
    pub actions: BTreeSet<ActionKey>,
    /// When the oldest run began that still goes on, in milliseconds since 1970.
    pub running_since_ms: Option<u64>,
}

/// What to collect.
pub struct Collect<'a> {
    /// Bytes that the store should have at most afterwards.
    pub max_bytes: Option<u64>,
    /// Results that were not used for this long go.
    pub max_age: Option<Duration>,
    /// Only say what would go.
    pub dry_run: bool,
    /// Asked twice: at the start, and when records are condemned.
    pub in_use: &'a dyn Fn() -> Result<InUse>,
}

/// An action that went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gone {
    pub key: ActionKey,
    pub pipeline: String,
    pub stage: String,
    /// Milliseconds since 1970.
    pub used_ms: u64,
    /// Of what nothing that stays needs.
    pub bytes: u64,
}

/// A namespace of rows that went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GoneRows {
    pub name: String,
    /// Milliseconds since 1970.
    pub used_ms: u64,
    pub bytes: u64,
}

/// What a collection did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    pub actions: Vec<Gone>,
    /// Row namespaces that went.
    pub namespaces: Vec<GoneRows>,
    pub blobs: u64,
    /// Everything that was freed.
    pub bytes: u64,
    /// Of it, what nobody could have used: blobs without record, dead attempts, quarantine, temporary files.
    pub garbage: u64,
    /// What the store holds afterwards.
    pub left: u64,
    /// What was to go, and stayed because it is in use.
    pub spared: u64,
}

impl Store {
    /// Dates a record that is used, so that no collector takes it for old. Whether it is still there.
    ///
    /// # Errors
    /// None that matter: who may not date it (another user's, a read-only disk) uses it all the same.
    pub fn touch_record(&self, key: &ActionKey, used_ms: u64) -> bool {
        let is_fresh = now_ms().saturating_sub(used_ms) < millis(fresh());
        if is_fresh || self.require_write().is_err() {
            return true;
        }
        let dated = date(&self.record_path(key));
        !matches!(dated, Err(rustix::io::Errno::NOENT))
    }

    /// Collects. Only one collection at a time; `None` if another goes on.
    ///
    /// # Errors
    /// The store cannot be read or written. What was condemned by then is gone, the rest is as it was.
    pub fn gc(&self, request: &Collect<'_>) -> Result<Option<Collected>> {
        self.require_write()?;
        let gate = self.root.join("locks").join("gc");
        let Some(_lock) = self.try_lock_path(&gate)? else { return Ok(None) };
        let mut collection = Collection::begin(self, request)?;
        collection.choose()?;
        if !request.dry_run {
            remove_tree(&self.root.join("trash"))?;
            collection.condemn_records()?;
            collection.condemn_blobs()?;
            collection.empty_trash()?;
        }
        let mut done = collection.done;
        done.left = collection.total.saturating_sub(done.bytes);
        if !request.dry_run {
            self.remember_size(done.left);
        }
        Ok(Some(done))
    }
}

/// Dates a file or folder with the present moment.
pub(crate) fn date(path: &Path) -> rustix::io::Result<()> {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty())
}

/// [`FRESH`], unless a test says otherwise.
pub(crate) fn fresh() -> Duration {
    crate::steps::claimed_fresh().map_or(FRESH, Duration::from_secs)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn now_ms() -> u64 {
    u64::try_from(now() / 1_000_000).unwrap_or(0)
}
