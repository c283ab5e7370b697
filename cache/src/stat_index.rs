//! The memory of large inputs and of how long stages take: a sled database on this host, opened only when it may pay.
//!
//! It is never the truth. A process that finds it taken works without it; one that cannot be opened is moved aside and
//! a new one begun. Nothing is synced on its account, except by sled itself when it is closed after writing.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::digest::Digest;
use crate::signature::{SIGNATURE_BYTES, Signature};

pub(crate) struct StatIndex {
    folder: PathBuf,
    writable: bool,
    database: OnceLock<Option<sled::Db>>,
}

const CACHE_BYTES: u64 = 16 << 20;
const FILES: &[u8] = b"f";
const DURATIONS: &[u8] = b"d";

impl StatIndex {
    /// `folder` is this host's part of `index/`.
    pub fn new(folder: PathBuf, writable: bool) -> StatIndex {
        StatIndex { folder, writable, database: OnceLock::new() }
    }

    /// The folder that this host's other memories lie in.
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The digest that the file had when it last had this very signature.
    pub fn digest(&self, signature: &Signature) -> Option<Digest> {
        let value = self.database()?.get(file_key(signature)).ok()??;
        let (known, digest) = value.split_first_chunk::<SIGNATURE_BYTES>()?;
        let digest = Digest::from_bytes(digest.try_into().ok()?);
        (Signature::from_bytes(known) == *signature).then_some(digest)
    }

    pub fn remember_digest(&self, signature: &Signature, digest: &Digest) {
        let value = [signature.to_bytes().as_slice(), digest.as_bytes()].concat();
        self.put(file_key(signature), value);
    }

    pub fn duration(&self, name: &str) -> Option<u64> {
        let value = self.database()?.get([DURATIONS, name.as_bytes()].concat()).ok()??;
        Some(u64::from_le_bytes(value.as_ref().try_into().ok()?))
    }

    pub fn remember_duration(&self, name: &str, milliseconds: u64) {
        self.put([DURATIONS, name.as_bytes()].concat(), milliseconds.to_le_bytes().to_vec());
    }

    fn put(&self, key: Vec<u8>, value: Vec<u8>) {
        if let Some(database) = self.database()
            && let Err(error) = database.insert(key, value)
        {
            tracing::warn!(%error, "cannot write to the index; what it should remember is worked out again");
        }
    }

    fn database(&self) -> Option<&sled::Db> {
        self.database.get_or_init(|| self.open()).as_ref()
    }

    fn open(&self) -> Option<sled::Db> {
        // sled writes even when it only reads.
        if !self.writable {
            return None;
        }
        let path = self.folder.join("sled");
        let open = || {
            let config = sled::Config::new().path(&path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
            catch_unwind(AssertUnwindSafe(|| config.open()))
        };
        let cause = match open() {
            Ok(Ok(database)) => return Some(database),
            Ok(Err(sled::Error::Io(error))) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // sled words a taken lock as "Other" on some platforms.
            Ok(Err(sled::Error::Io(error))) if error.to_string().contains("could not acquire lock") => return None,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        tracing::warn!(path = %path.display(), cause, "the index is broken; a new one is begun");
        let aside = self.folder.join("sled.broken");
        let _ = fs::remove_dir_all(&aside);
        fs::rename(&path, &aside).ok()?;
        open().ok()?.ok()
    }
}

/// One entry per inode: a file that changed replaces its own, so the index does not grow with edits.
fn file_key(signature: &Signature) -> Vec<u8> {
    [FILES, &signature.device.to_le_bytes(), &signature.inode.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNATURE: Signature = Signature { device: 1, inode: 2, size: 3, mtime: 4, ctime: 5 };

    #[test]
    fn only_the_very_same_signature_has_a_digest() {
        let dir = tempfile::tempdir().unwrap();
        let index = StatIndex::new(dir.path().join("host"), true);
        let digest = Digest::of(b"content");
        index.remember_digest(&SIGNATURE, &digest);
        assert_eq!(index.digest(&SIGNATURE), Some(digest));
        for changed in [
            Signature { size: 9, ..SIGNATURE },
            Signature { mtime: 9, ..SIGNATURE },
            Signature { ctime: 9, ..SIGNATURE },
            Signature { inode: 9, ..SIGNATURE },
            Signature { device: 9, ..SIGNATURE },
        ] {
            assert_eq!(index.digest(&changed), None);
        }
        index.remember_duration("train", 42);
        drop(index);
        let index = StatIndex::new(dir.path().join("host"), true);
        assert_eq!(
            (index.digest(&SIGNATURE), index.duration("train"), index.duration("x")),
            (Some(digest), Some(42), None)
        );
    }

    #[test]
    #[ignore = "sled mends a damaged `conf` by itself: the test needs another kind of damage"]
    fn taken_broken_and_read_only_indexes_are_done_without() {
        let dir = tempfile::tempdir().unwrap();
        let first = StatIndex::new(dir.path().to_path_buf(), true);
        first.remember_duration("a", 1);
        let second = StatIndex::new(dir.path().to_path_buf(), true);
        second.remember_duration("a", 2);
        assert_eq!((first.duration("a"), second.duration("a")), (Some(1), None));
        assert!(!dir.path().join("sled.broken").exists(), "a taken index is not a broken one");
        drop((first, second));
        fs::write(dir.path().join("sled/conf"), b"garbage").unwrap();
        let third = StatIndex::new(dir.path().to_path_buf(), true);
        third.remember_duration("a", 3);
        assert_eq!(third.duration("a"), Some(3));
        assert!(dir.path().join("sled.broken").exists());
        assert_eq!(StatIndex::new(dir.path().join("none"), false).duration("a"), None);
        assert!(!dir.path().join("none").exists());
    }
}
