//! The memory of large inputs: a sled database on this host, opened only when it may pay.
//!
//! It is never the truth. A process that finds it taken works without it; one that cannot be opened, or fails or panics
//! when it is asked, is moved aside and a new one begun by whoever opens it next. Values carry a check of their own.
//! Nothing is synced on its account, except by sled itself when it is closed after writing.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::digest::Digest;
use crate::signature::{SIGNATURE_BYTES, Signature};

pub(crate) struct StatIndex {
    folder: PathBuf,
    writable: bool,
    database: OnceLock<Option<sled::Db>>,
    /// It failed while in use: this process does without it from then on.
    failed: AtomicBool,
}

const CACHE_BYTES: u64 = 16 << 20;
const FILES: &[u8] = b"f";
/// Of the end of each value.
const CHECK_BYTES: usize = 8;
/// A file of this name beside the database says that it failed in use.
const BROKEN_MARK: &str = "sled.failed";

impl StatIndex {
    /// `folder` is this host's part of `index/`.
    pub fn new(folder: PathBuf, writable: bool) -> StatIndex {
        StatIndex { folder, writable, database: OnceLock::new(), failed: AtomicBool::new(false) }
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
        let value = self.get(file_key(signature))?;
        let (known, digest) = value.split_first_chunk::<SIGNATURE_BYTES>()?;
        let digest = Digest::from_bytes(digest.try_into().ok()?);
        (Signature::from_bytes(known) == *signature).then_some(digest)
    }

    pub fn remember_digest(&self, signature: &Signature, digest: &Digest) {
        self.put(file_key(signature), [signature.to_bytes().as_slice(), digest.as_bytes()].concat());
    }

    fn get(&self, key: Vec<u8>) -> Option<Vec<u8>> {
        let found = self.guarded(|database| database.get(&key))??;
        let (value, check) = found.split_last_chunk::<CHECK_BYTES>()?;
        (*check == check_of(&key, value)).then(|| value.to_vec())
    }

    fn put(&self, key: Vec<u8>, mut value: Vec<u8>) {
        value.extend_from_slice(&check_of(&key, &value));
        self.guarded(|database| database.insert(&key, value.as_slice()));
    }

    /// What the database says. One that fails or panics is not asked again, and marked for whoever opens it next.
    fn guarded<T>(&self, ask: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Option<T> {
        if self.failed.load(Ordering::Relaxed) {
            return None;
        }
        let database = self.database()?;
        let cause = match catch_unwind(AssertUnwindSafe(|| ask(database))) {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        tracing::warn!(cause, "the index is broken; what it should remember is worked out again");
        self.failed.store(true, Ordering::Relaxed);
        let _ = fs::write(self.folder.join(BROKEN_MARK), "");
        None
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
        let marked = fs::remove_file(self.folder.join(BROKEN_MARK)).is_ok();
        let cause = match open() {
            Ok(Ok(database)) if !marked => return Some(database),
            Ok(Ok(_)) => "it failed when it was last used".to_owned(),
            Ok(Err(sled::Error::Io(error))) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // sled words a taken lock as "Other" on some platforms.
            Ok(Err(sled::Error::Io(error))) if error.to_string().contains("could not acquire lock") => return None,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        tracing::warn!(path = %path.display(), cause, "the index is broken; a new one is begun");
        let aside = self.folder.join("sled.broken");
        let _ = fs::remove_dir_all(&aside).or_else(|_| fs::remove_file(&aside));
        fs::rename(&path, &aside).ok()?;
        open().ok()?.ok()
    }
}

/// One entry per inode: a file that changed replaces its own, so the index does not grow with edits.
fn file_key(signature: &Signature) -> Vec<u8> {
    [FILES, &signature.device.to_le_bytes(), &signature.inode.to_le_bytes()].concat()
}

fn check_of(key: &[u8], value: &[u8]) -> [u8; CHECK_BYTES] {
    let hash = blake3::Hasher::new().update(key).update(value).finalize();
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&hash.as_bytes()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNATURE: Signature = Signature { device: 1, inode: 2, size: 3, mtime: 4, ctime: 5 };

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

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
        drop(index);
        assert_eq!(StatIndex::new(dir.path().join("host"), true).digest(&SIGNATURE), Some(digest));
    }

    #[test]
    fn a_taken_and_a_read_only_index_are_done_without() {
        let dir = tempfile::tempdir().unwrap();
        let first = StatIndex::new(dir.path().to_path_buf(), true);
        first.remember_digest(&SIGNATURE, &digest(1));
        let second = StatIndex::new(dir.path().to_path_buf(), true);
        second.remember_digest(&SIGNATURE, &digest(2));
        assert_eq!((first.digest(&SIGNATURE), second.digest(&SIGNATURE)), (Some(digest(1)), None));
        assert!(!dir.path().join("sled.broken").exists(), "a taken index is not a broken one");
        assert_eq!(StatIndex::new(dir.path().join("none"), false).digest(&SIGNATURE), None);
        assert!(!dir.path().join("none").exists());
    }

    /// sled mends a torn log and a damaged `conf` by itself. What it refuses is a database of other settings (a valid
    /// `conf` that is not ours), and a path that is no folder.
    #[test]
    fn an_index_that_cannot_be_opened_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sled");
        drop(sled::Config::new().path(&path).segment_size(1 << 16).open().unwrap());
        for round in 0..2 {
            let index = StatIndex::new(dir.path().to_path_buf(), true);
            index.remember_digest(&SIGNATURE, &digest(round));
            assert_eq!(index.digest(&SIGNATURE), Some(digest(round)));
            assert!(dir.path().join("sled.broken").exists());
            drop(index);
            fs::remove_dir_all(&path).unwrap();
            fs::write(&path, "no folder").unwrap();
        }
    }

    #[test]
    fn an_index_that_failed_in_use_is_begun_anew_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let index = StatIndex::new(dir.path().to_path_buf(), true);
        index.remember_digest(&SIGNATURE, &digest(1));
        assert_eq!(index.guarded(|_| -> sled::Result<u64> { panic!("as sled does on some kinds of damage") }), None);
        assert_eq!(index.digest(&SIGNATURE), None, "not asked again");
        drop(index);
        let next = StatIndex::new(dir.path().to_path_buf(), true);
        assert_eq!(next.digest(&SIGNATURE), None);
        next.remember_digest(&SIGNATURE, &digest(2));
        drop(next);
        assert_eq!(StatIndex::new(dir.path().to_path_buf(), true).digest(&SIGNATURE), Some(digest(2)));
    }

    #[test]
    fn flipped_bits_anywhere_never_give_a_wrong_digest() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("host");
        let of = |inode| Signature { inode, ..SIGNATURE };
        let index = StatIndex::new(folder.clone(), true);
        (0..64u64).for_each(|i| index.remember_digest(&of(i), &Digest::of(&i.to_le_bytes())));
        drop(index);
        let whole = fs::read(folder.join("sled/db")).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
        for round in 0..12 {
            let mut flipped = whole.clone();
            (0..8).for_each(|i| flipped[(round * 7919 + i * 104_729) % used] ^= 1 << (i % 8));
            fs::write(folder.join("sled/db"), &flipped).unwrap();
            let index = StatIndex::new(folder.clone(), true);
            for i in 0..64u64 {
                let found = index.digest(&of(i));
                assert!(found.is_none_or(|digest| digest == Digest::of(&i.to_le_bytes())), "round {round}, entry {i}");
            }
            drop(index);
            let _ = fs::remove_dir_all(folder.join("sled"));
            fs::create_dir_all(folder.join("sled")).unwrap();
        }
    }
}
