//! The digest of a file or folder of the user's, read as seldom as can be: an input that has the stat signature it had
//! when it was last hashed is not read. Nothing outside the store is changed.
//!
//! Small inputs are simply hashed: that costs less than opening the index. A file that was modified within the clock
//! tick in which its hashing began is never remembered, since a later edit in that tick would not show.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rayon::prelude::*;
use rustix::fs::FileType;

use crate::blobs::signature_of;
use crate::content::{Content, ContentKind, FolderEntry, FolderManifest};
use crate::digest::Digest;
use crate::folder_snapshot::{FolderSnapshot, SnapshotEntry};
use crate::hash::hash_file;
use crate::signature::{Signature, now};
use crate::store::Store;
use crate::walk::{Walked, WalkedKind, name_of, walk};
use crate::{Result, StoreError};

/// A process hashes this much before it opens the index, which costs about as long.
const HASH_UNASKED: u64 = 32 << 20;
/// Smaller files are not worth an entry.
const WORTH_INDEXING: u64 = 1 << 20;
/// Folders with fewer files and bytes are hashed without a snapshot.
const SNAPSHOT_FILES: usize = 256;
const SNAPSHOT_BYTES: u64 = 4 << 20;
/// How often a file that changes under the reader's eyes is read again.
const PATIENCE: usize = 3;

impl Store {
    /// What is at `path` at this moment. Links are followed; pipes, sockets and devices are refused.
    pub fn digest(&self, path: &Path) -> Result<Content> {
        let metadata = fs::metadata(path).map_err(StoreError::while_doing("read", path))?;
        if metadata.is_dir() {
            return self.digest_folder(path);
        }
        if !metadata.is_file() {
            use std::os::unix::fs::MetadataExt;
            let what = name_of(FileType::from_raw_mode(metadata.mode()));
            return Err(StoreError::Special { path: path.to_path_buf(), what });
        }
        let (digest, signature) = self.digest_file(path, &Signature::of(&metadata))?;
        Ok(Content { digest, kind: ContentKind::File, size: signature.size, files: 1 })
    }

    fn digest_file(&self, path: &Path, signature: &Signature) -> Result<(Digest, Signature)> {
        let ask = signature.size >= WORTH_INDEXING
            && self.hashed_unasked.fetch_add(signature.size, Ordering::Relaxed).saturating_add(signature.size)
                > HASH_UNASKED;
        if ask && let Some(digest) = self.index.digest(signature) {
            return Ok((digest, *signature));
        }
        let hashed = hash_path(path)?;
        if ask && !hashed.signature.is_racy(hashed.began) {
            self.index.remember_digest(&hashed.signature, &hashed.digest);
        }
        Ok((hashed.digest, hashed.signature))
    }

    fn digest_folder(&self, root: &Path) -> Result<Content> {
        let walked = walk(root)?;
        let bytes = walked.iter().fold(0u64, |sum, walked| match walked.kind {
            WalkedKind::File { signature, .. } => sum.saturating_add(signature.size),
            WalkedKind::EmptyFolder => sum,
        });
        let is_large = walked.len() >= SNAPSHOT_FILES || bytes >= SNAPSHOT_BYTES;
        let place = is_large.then(|| self.snapshot_path(root)).transpose()?;
        let snapshot = place.as_deref().and_then(FolderSnapshot::load).unwrap_or_default();
        let looked: Vec<Looked> = match_up(walked, snapshot.entries)
            .into_par_iter()
            .with_min_len(16)
            .map(|(walked, known)| look(root, walked, known))
            .collect::<Result<_>>()?;
        if let Some(place) = place.filter(|_| self.index.writable() && looked.iter().any(|looked| looked.fresh)) {
            let entries = looked.iter().filter_map(|looked| looked.remember.clone()).collect();
            if let Err(error) = (FolderSnapshot { entries }).save(&place) {
                tracing::warn!(path = %place.display(), %error, "cannot remember the folder; it will be hashed again");
            }
        }
        let manifest = FolderManifest::new(looked.into_iter().map(|looked| looked.entry).collect());
        Ok(manifest.content())
    }

    fn snapshot_path(&self, root: &Path) -> Result<PathBuf> {
        let real = fs::canonicalize(root).map_err(StoreError::while_doing("resolve", root))?;
        let name = Digest::of(real.as_os_str().as_encoded_bytes());
        Ok(self.index.folder().join("folders").join(name.hex()))
    }
}

struct Hashed {
    digest: Digest,
    signature: Signature,
    began: i64,
}

/// Hashes a file that may be changing: what is returned was all there at one moment.
fn hash_path(path: &Path) -> Result<Hashed> {
    for _ in 0..PATIENCE {
        let began = now();
        let file = File::open(path).map_err(StoreError::while_doing("open", path))?;
        let signature = signature_of(&file, path)?;
        match hash_file(&file, signature.size) {
            Ok(digest) if signature_of(&file, path)? == signature => return Ok(Hashed { digest, signature, began }),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => return Err(StoreError::io("read", path, error)),
        }
    }
    Err(StoreError::Changing { path: path.to_path_buf() })
}

struct Looked {
    entry: FolderEntry,
    remember: Option<SnapshotEntry>,
    /// Not as the snapshot has it.
    fresh: bool,
}

fn look(root: &Path, walked: Walked, known: Option<SnapshotEntry>) -> Result<Looked> {
    let WalkedKind::File { signature, .. } = walked.kind else {
        return Ok(Looked {
            entry: FolderEntry { path: walked.path, digest: None, size: 0 },
            remember: None,
            fresh: false,
        });
    };
    if let Some(known) = known.filter(|known| known.signature == signature) {
        let entry = FolderEntry { path: walked.path, digest: Some(known.digest), size: signature.size };
        return Ok(Looked { entry, remember: Some(known), fresh: false });
    }
    let hashed = hash_path(&root.join(&walked.path))?;
    let remember = (!hashed.signature.is_racy(hashed.began)).then(|| SnapshotEntry {
        path: walked.path.clone(),
        signature: hashed.signature,
        digest: hashed.digest,
    });
    let entry = FolderEntry { path: walked.path, digest: Some(hashed.digest), size: hashed.signature.size };
    Ok(Looked { entry, fresh: remember.is_some(), remember })
}

/// Pairs what was walked with what was known, both sorted by path bytes.
fn match_up(walked: Vec<Walked>, known: Vec<SnapshotEntry>) -> Vec<(Walked, Option<SnapshotEntry>)> {
    let mut known = known.into_iter().peekable();
    let pair = |walked: Walked| {
        while known.next_if(|known| known.path.as_bytes() < walked.path.as_bytes()).is_some() {}
        let same = known.next_if(|known| known.path == walked.path);
        (walked, same)
    };
    walked.into_iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::testing::store;

    /// Dates a file back; its ctime is still now, so it stays racy for a moment.
    fn write_old(path: &Path, bytes: &[u8]) {
        fs::write(path, bytes).unwrap();
        let old = SystemTime::now() - Duration::from_secs(1000);
        File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    }

    fn wait_out_the_tick() {
        std::thread::sleep(Duration::from_millis(70));
    }

    #[test]
    fn files_and_folders_are_what_ingesting_them_would_give() {
        let (dir, store) = store();
        let folder = dir.path().join("folder");
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(folder.join("sub/a"), "1").unwrap();
        fs::write(folder.join("b"), "22").unwrap();
        let seen = store.digest(&folder).unwrap();
        assert_eq!(store.digest(&folder.join("b")).unwrap().digest, Digest::of(b"22"));
        assert_eq!(store.digest(&folder).unwrap(), seen);
        assert_eq!(store.ingest(&folder).unwrap(), seen);
        assert!(matches!(store.digest(Path::new("/dev/null")), Err(StoreError::Special { .. })));
        assert!(matches!(store.digest(&dir.path().join("none")), Err(StoreError::Io { .. })));
    }

    #[test]
    fn every_edit_in_quick_succession_is_seen() {
        let (dir, store) = store();
        store.hashed_unasked.store(u64::MAX, Ordering::Relaxed);
        let path = dir.path().join("input");
        let mut bytes = vec![0; WORTH_INDEXING as usize];
        for round in 0..40u8 {
            bytes[0] = round;
            write_old(&path, &bytes);
            assert_eq!(store.digest(&path).unwrap().digest, Digest::of(&bytes));
        }
    }

    #[test]
    fn a_large_file_is_remembered_once_it_is_not_young() {
        let (dir, store) = store();
        store.hashed_unasked.store(1 << 40, Ordering::Relaxed);
        let path = dir.path().join("input");
        let bytes = vec![7; WORTH_INDEXING as usize];
        fs::write(&path, &bytes).unwrap();
        let date = |time| fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        // Young for as long as the test may take.
        date(SystemTime::now() + Duration::from_secs(3600));
        store.digest(&path).unwrap();
        assert_eq!(store.index.digest(&Signature::of(&fs::metadata(&path).unwrap())), None);
        date(SystemTime::now());
        let signature = Signature::of(&fs::metadata(&path).unwrap());
        wait_out_the_tick();
        store.digest(&path).unwrap();
        assert_eq!(store.index.digest(&signature), Some(Digest::of(&bytes)));
        store.index.remember_digest(&signature, &Digest::of(b"mark"));
        assert_eq!(store.digest(&path).unwrap().digest, Digest::of(b"mark"), "the index was asked");
        fs::write(&path, &bytes).unwrap();
        assert_eq!(store.digest(&path).unwrap().digest, Digest::of(&bytes));
    }

    #[test]
    fn a_large_folder_is_read_where_it_changed() {
        let (dir, store) = store();
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        for i in 0..SNAPSHOT_FILES + 5 {
            fs::write(folder.join(format!("{i:04}")), i.to_string()).unwrap();
        }
        wait_out_the_tick();
        let first = store.digest(&folder).unwrap();
        let place = store.snapshot_path(&folder).unwrap();
        let mut snapshot = FolderSnapshot::load(&place).unwrap();
        assert_eq!(snapshot.entries.len(), SNAPSHOT_FILES + 5);
        assert_eq!(store.digest(&folder).unwrap(), first);
        snapshot.entries[3].digest = Digest::of(b"mark");
        snapshot.save(&place).unwrap();
        assert_ne!(store.digest(&folder).unwrap(), first, "the snapshot was used");
        fs::write(folder.join("0003"), "3").unwrap();
        assert_eq!(store.digest(&folder).unwrap(), first, "the file that was touched was read");
        fs::write(folder.join("0004"), "x").unwrap();
        fs::remove_file(folder.join("0005")).unwrap();
        fs::write(folder.join("0004a"), "new").unwrap();
        let changed = store.digest(&folder).unwrap();
        assert_eq!(changed.files, first.files);
        fs::remove_dir_all(place.parent().unwrap()).unwrap();
        assert_eq!(store.digest(&folder).unwrap(), changed, "the same without the snapshot");
    }
}
