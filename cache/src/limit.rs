//! How large a store may become before it says so. Nothing is ever removed on that account but by [`Store::gc`].

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::inventory::tree_bytes;
use crate::signature::now;
use crate::store::Store;
use crate::{Result, StoreError};

/// The limit of a store that was given none, unless half of its disk is less.
pub const DEFAULT_LIMIT: u64 = 100 << 30;
/// A size that was counted longer ago is counted anew.
const COUNTED_FOR: Duration = Duration::from_secs(24 * 3600);

#[derive(Serialize, Deserialize)]
struct Counted {
    bytes: u64,
    at_ms: u64,
}

impl Store {
    /// The size that this store should not exceed, and whether a user chose it.
    pub fn limit(&self) -> (u64, bool) {
        let chosen = fs::read_to_string(self.limit_path()).ok().and_then(|text| text.trim().parse().ok());
        let half = || rustix::fs::statvfs(&self.root).map_or(u64::MAX, |disk| disk.f_blocks * disk.f_frsize / 2);
        chosen.map_or_else(|| (DEFAULT_LIMIT.min(half()), false), |bytes| (bytes, true))
    }

    /// Chooses the limit, for everyone who uses this store.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn set_limit(&self, bytes: u64) -> Result<()> {
        let path = self.limit_path();
        let mut staged = self.temporary()?;
        writeln!(staged, "{bytes}").map_err(StoreError::while_doing("write", staged.path()))?;
        staged.persist(&path).map_err(|error| StoreError::io("place", &path, error.error))?;
        Ok(())
    }

    /// About how large the store is: counted at most once a day, and added to as results come in.
    pub fn size(&self) -> u64 {
        let added = self.ingested.swap(0, Ordering::Relaxed);
        let at_ms = now_ms();
        let fresh = |counted: &Counted| {
            at_ms.checked_sub(counted.at_ms).is_some_and(|age| u128::from(age) < COUNTED_FOR.as_millis())
        };
        let counted: Option<Counted> =
            fs::read(self.size_path()).ok().and_then(|text| serde_json::from_slice(&text).ok()).filter(fresh);
        let (bytes, at_ms) = match counted {
            Some(counted) => (counted.bytes + added, counted.at_ms),
            None => (tree_bytes(&self.root), at_ms),
        };
        self.write_size(&Counted { bytes, at_ms });
        bytes
    }

    /// Bytes of the disk that are free for this store's user.
    pub fn disk_free(&self) -> Option<u64> {
        rustix::fs::statvfs(&self.root).ok().map(|disk| disk.f_bavail * disk.f_frsize)
    }

    pub(crate) fn remember_size(&self, bytes: u64) {
        self.write_size(&Counted { bytes, at_ms: now_ms() });
    }

    fn write_size(&self, counted: &Counted) {
        if self.require_write().is_err() {
            return;
        }
        let write = |path: &Path| -> io::Result<()> {
            fs::create_dir_all(self.index.folder())?;
            let staged = path.with_extension(format!("{}", std::process::id()));
            fs::write(&staged, serde_json::to_vec(counted)?)?;
            fs::rename(staged, path)
        };
        if let Err(error) = write(&self.size_path()) {
            tracing::debug!(%error, "the size is not remembered; it is counted again");
        }
    }

    fn size_path(&self) -> std::path::PathBuf {
        self.index.folder().join("size.json")
    }

    fn limit_path(&self) -> std::path::PathBuf {
        self.root.join("LIMIT")
    }
}

fn now_ms() -> u64 {
    u64::try_from(now() / 1_000_000).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ingested, store};

    #[test]
    fn the_size_follows_what_comes_in_and_the_limit_is_the_users() {
        let (_dir, store) = store();
        let (default, chosen) = store.limit();
        assert!(default <= DEFAULT_LIMIT && default > 0 && !chosen);
        store.set_limit(12_345).unwrap();
        assert_eq!(store.limit(), (12_345, true));
        let before = store.size();
        ingested(&store, &"x".repeat(1000));
        ingested(&store, &"x".repeat(1000));
        assert_eq!(store.size(), before + 1000, "the second was there already");
        assert_eq!(store.size(), before + 1000);
        fs::write(store.size_path(), "garbage").unwrap();
        assert!(store.size() >= 1000, "counted anew");
    }
}
