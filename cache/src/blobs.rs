//! Blobs: how content comes in, and how it is found whole. A blob is a read-only file named by its digest.
//!
//! Order of ingestion: set the mode and an old modification time (so that any later write shows in the stat
//! signature, even within the same clock tick), hash, look again, sync, rename, remember the signature.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rayon::prelude::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use crate::content::{Content, ContentKind, FolderEntry, FolderManifest};
use crate::digest::Digest;
use crate::hash::hash_file;
use crate::signature::{Signature, now};
use crate::signature_log::Remembered;
use crate::steps::{Step, reach, synced};
use crate::store::{Access, Store, move_away, rename_into};
use crate::walk::{Walked, WalkedKind, walk};
use crate::{Result, StoreError, sync};

/// Whether a content is in the store, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Intact,
    /// This blob (of several, for a folder) is not there.
    Missing(Digest),
    /// This blob was not what its name says. It was moved to `quarantined`, unless the store is open for reading only.
    Damaged {
        digest: Digest,
        quarantined: Option<PathBuf>,
    },
}

impl Health {
    pub fn is_intact(&self) -> bool {
        *self == Health::Intact
    }
}

impl Store {
    /// Where the blob of this name is, or would be. Its file name means nothing to programs that look at extensions:
    /// they want [`Store::stage_input`].
    pub fn path_of(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let (shard, rest) = hex.split_at(2);
        let mut path = self.root.join("blobs");
        path.push(shard);
        path.push(rest);
        path
    }

    /// Moves a file or folder into the store: afterwards nothing is at `path`. Links are replaced by copies of what
    /// they lead to, and so is a file that has other names outside, which a move would make read-only.
    pub fn ingest(&self, path: &Path) -> Result<Content> {
        self.require_write()?;
        let metadata = fs::symlink_metadata(path).map_err(StoreError::while_doing("look at", path))?;
        let linked = metadata.is_symlink();
        let metadata =
            if linked { fs::metadata(path).map_err(StoreError::while_doing("follow", path))? } else { metadata };
        if metadata.is_dir() {
            return self.ingest_folder(path, linked);
        }
        if !metadata.is_file() {
            let kind = rustix::fs::FileType::from_raw_mode(metadata.mode());
            return Err(StoreError::Special { path: path.to_path_buf(), what: crate::walk::name_of(kind) });
        }
        let (digest, size) = self.ingest_file(path, linked)?;
        Ok(Content { digest, kind: ContentKind::File, size, files: 1 })
    }

    /// Whether the content is in the store as it should be. Costs one stat per blob while nothing has touched it.
    pub fn check(&self, content: &Content) -> Result<Health> {
        match content.kind {
            ContentKind::File => self.check_blob(&content.digest, Some(content.size)),
            ContentKind::Folder => {
                let health = self.check_blob(&content.digest, None)?;
                if !health.is_intact() {
                    return Ok(health);
                }
                let manifest = self.manifest(&content.digest)?;
                let check = |entry: &FolderEntry| match &entry.digest {
                    Some(digest) => self.check_blob(digest, Some(entry.size)),
                    None => Ok(Health::Intact),
                };
                let found = manifest
                    .entries()
                    .par_iter()
                    .with_min_len(64)
                    .map(check)
                    .filter(|health| !matches!(health, Ok(Health::Intact)));
                found.collect::<Result<Vec<_>>>().map(|wrong| wrong.into_iter().next().unwrap_or(Health::Intact))
            }
        }
    }

    /// The files of a folder content.
    pub fn manifest(&self, digest: &Digest) -> Result<FolderManifest> {
        let path = self.path_of(digest);
        match fs::read(&path) {
            Ok(text) => FolderManifest::parse(&text, *digest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(StoreError::Missing { digest: *digest }),
            Err(error) => Err(StoreError::io("read", &path, error)),
        }
    }

    /// Checks one blob; `size` is what a record says about it, if it says anything.
    pub(crate) fn check_blob(&self, digest: &Digest, size: Option<u64>) -> Result<Health> {
        let path = self.path_of(digest);
        let Some((signature, is_file)) = look_at(&path)? else { return Ok(Health::Missing(*digest)) };
        if !is_file || size.is_some_and(|size| size != signature.size) {
            return self.quarantine(digest, &path, &signature);
        }
        if self.blob_log.get(digest).is_some_and(|known| known.signature == signature) {
            return Ok(Health::Intact);
        }
        self.rehash_blob(digest)
    }

    /// Reads the blob, whatever is remembered about it.
    pub(crate) fn rehash_blob(&self, digest: &Digest) -> Result<Health> {
        let path = self.path_of(digest);
        let began = now();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Health::Missing(*digest)),
            Err(error) => return Err(StoreError::io("open", &path, error)),
        };
        let signature = signature_of(&file, &path)?;
        match hash_file(&file, signature.size) {
            Ok(found) if found == *digest => {}
            Ok(_) => return self.quarantine(digest, &path, &signature),
            // Shorter than its own stat said: somebody is truncating it.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return self.quarantine(digest, &path, &signature);
            }
            Err(error) => return Err(StoreError::io("read", &path, error)),
        }
        let after = signature_of(&file, &path)?;
        if after.same_but_ctime(&signature) && !after.is_racy_blob(began) {
            self.blob_log.put(*digest, Remembered { digest: *digest, signature: after, on_disk: true });
        }
        Ok(Health::Intact)
    }

    /// Moves a blob aside that was found `damaged`, unless another did, who may have brought a good one since.
    fn quarantine(&self, digest: &Digest, path: &Path, damaged: &Signature) -> Result<Health> {
        if self.access == Access::Read {
            return Ok(Health::Damaged { digest: *digest, quarantined: None });
        }
        let aside = self.root.join("quarantine").join(format!("{digest}-{}", now()));
        if !move_away(path, &aside)? {
            return Ok(Health::Missing(*digest));
        }
        if look_at(&aside)?.is_some_and(|(moved, _)| moved.inode != damaged.inode) {
            rename_into(&aside, path)?;
            return self.rehash_blob(digest);
        }
        tracing::warn!(blob = %digest, moved_to = %aside.display(), "a blob is not what its name says");
        Ok(Health::Damaged { digest: *digest, quarantined: Some(aside) })
    }

    /// Takes in one file. `foreign`: it is not ours to move, as it lies behind a link.
    fn ingest_file(&self, path: &Path, foreign: bool) -> Result<(Digest, u64)> {
        let metadata = fs::metadata(path).map_err(StoreError::while_doing("look at", path))?;
        let elsewhere = || fs::metadata(&self.root).map_or(true, |root| root.dev() != metadata.dev());
        if !foreign && metadata.nlink() == 1 && !elsewhere() {
            return self.place_file(path);
        }
        let staged = self.temporary()?;
        fs::copy(path, staged.path()).map_err(StoreError::while_doing("copy into the store", path))?;
        let placed = self.place_file(staged.path())?;
        // A link, or one of several names: the file itself stays where it was.
        fs::remove_file(path).map_err(StoreError::while_doing("remove", path))?;
        Ok(placed)
    }

    /// Seals, hashes and moves a file on the store's own disk that nobody else uses.
    fn place_file(&self, staged: &Path) -> Result<(Digest, u64)> {
        let file = File::open(staged).map_err(StoreError::while_doing("open", staged))?;
        let sealed = seal(&file, staged)?;
        reach(Step::Sealed, staged)?;
        let digest = hash_file(&file, sealed.size).map_err(StoreError::while_doing("read", staged))?;
        reach(Step::Hashed, staged)?;
        if !signature_of(&file, staged)?.same_but_ctime(&sealed) {
            return Err(StoreError::Changing { path: staged.to_path_buf() });
        }
        let blob = self.path_of(&digest);
        if self.is_there(&digest, sealed.size, &blob)? {
            fs::remove_file(staged).map_err(StoreError::while_doing("remove", staged))?;
            return Ok((digest, sealed.size));
        }
        let on_disk = sealed.size >= sync::SYNC_AT_ONCE;
        if on_disk {
            file.sync_all().map_err(StoreError::while_doing("sync", staged))?;
            synced(&blob);
            reach(Step::BlobSynced, staged)?;
        }
        rename_into(staged, &blob)?;
        self.ingested.fetch_add(sealed.size, Ordering::Relaxed);
        reach(Step::BlobPlaced, &blob)?;
        let signature = signature_of(&file, &blob)?;
        if !signature.same_but_ctime(&sealed) {
            return Err(StoreError::Changing { path: blob });
        }
        self.blob_log.put(digest, Remembered { digest, signature, on_disk });
        reach(Step::BlobRemembered, &blob)?;
        self.pending.defer(blob);
        Ok((digest, sealed.size))
    }

    /// Whether the blob is there already. Touches it, so that a collector that runs now sees it as new.
    fn is_there(&self, digest: &Digest, size: u64, blob: &Path) -> Result<bool> {
        if !self.check_blob(digest, Some(size))?.is_intact() {
            return Ok(false);
        }
        self.keep_signature(digest, || {
            let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let as_it_is = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
            let times = Timestamps { last_access: now, last_modification: as_it_is };
            // Gone, or not ours to touch: it is placed again.
            Ok(rustix::fs::utimensat(CWD, blob, &times, AtFlags::SYMLINK_NOFOLLOW).is_ok())
        })
    }

    /// Runs something that changes the blob's ctime and not its content (a link, a chmod), and carries what is
    /// remembered over to the new signature, provided that it held before and nothing but the ctime changed.
    pub(crate) fn keep_signature<T>(&self, digest: &Digest, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let path = self.path_of(digest);
        let known = self.blob_log.get(digest);
        let held =
            known.filter(|known| matches!(look_at(&path), Ok(Some((signature, _))) if signature == known.signature));
        let result = change()?;
        if let Some(known) = held
            && let Ok(Some((signature, _))) = look_at(&path)
            && signature.same_but_ctime(&known.signature)
        {
            self.blob_log.put(*digest, Remembered { signature, ..known });
        }
        Ok(result)
    }

    fn ingest_folder(&self, root: &Path, foreign: bool) -> Result<Content> {
        let take = |walked: Walked| -> Result<FolderEntry> {
            let path = root.join(&walked.path);
            let (digest, size) = match walked.kind {
                WalkedKind::EmptyFolder => return Ok(FolderEntry { path: walked.path, digest: None, size: 0 }),
                WalkedKind::File { linked, .. } if linked || foreign => self.copy_in(&path)?,
                WalkedKind::File { .. } => self.ingest_file(&path, false)?,
            };
            Ok(FolderEntry { path: walked.path, digest: Some(digest), size })
        };
        // What lies behind links goes first: its target may be a file of this very folder, which then moves away.
        let (linked, own): (Vec<_>, Vec<_>) =
            walk(root)?.into_iter().partition(|walked| matches!(walked.kind, WalkedKind::File { linked: true, .. }));
        let mut entries = linked.into_par_iter().map(take).collect::<Result<Vec<_>>>()?;
        entries.append(&mut own.into_par_iter().map(take).collect::<Result<Vec<_>>>()?);
        reach(Step::FolderFilesPlaced, root)?;
        let manifest = FolderManifest::new(entries);
        let staged = self.temporary()?;
        fs::write(staged.path(), manifest.to_text()).map_err(StoreError::while_doing("write", staged.path()))?;
        reach(Step::ManifestStaged, staged.path())?;
        let (digest, _) = self.place_file(staged.path())?;
        reach(Step::FolderPlaced, root)?;
        let removed = if foreign { fs::remove_file(root) } else { fs::remove_dir_all(root) };
        removed.map_err(StoreError::while_doing("remove", root))?;
        Ok(manifest.content_of(digest))
    }

    /// Takes in a copy; the original stays.
    fn copy_in(&self, path: &Path) -> Result<(Digest, u64)> {
        let staged = self.temporary()?;
        fs::copy(path, staged.path()).map_err(StoreError::while_doing("copy into the store", path))?;
        self.place_file(staged.path())
    }
}

/// Makes the file read-only and dates it to before the present second.
fn seal(file: &File, path: &Path) -> Result<Signature> {
    let second = now().div_euclid(1_000_000_000) - 1;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: Timespec { tv_sec: second, tv_nsec: 0 },
    };
    rustix::fs::fchmod(file, rustix::fs::Mode::from_raw_mode(0o444))
        .map_err(StoreError::while_doing("make read-only", path))?;
    rustix::fs::futimens(file, &times).map_err(StoreError::while_doing("date", path))?;
    signature_of(file, path)
}

pub(crate) fn signature_of(file: &File, path: &Path) -> Result<Signature> {
    let stat = rustix::fs::fstat(file).map_err(StoreError::while_doing("look at", path))?;
    Ok(Signature::of_stat(&stat))
}

/// The signature of what is at a path, and whether it is a plain file; `None` if nothing is.
pub(crate) fn look_at(path: &Path) -> Result<Option<(Signature, bool)>> {
    match rustix::fs::lstat(path) {
        Ok(stat) => Ok(Some((Signature::of_stat(&stat), rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()))),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(error) => Err(StoreError::io("look at", path, error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::testing::{ingested, key, staged, store};

    /// Writes through whatever mode the file has, as an editor that insists would.
    fn overwrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        OpenOptions::new().write(true).truncate(true).open(path).unwrap().write_all(&bytes).unwrap();
    }

    #[test]
    fn a_file_is_moved_in_read_only_and_named_by_its_digest() {
        let (_dir, store) = store();
        let path = staged(&store, 1, "words");
        let content = store.ingest(&path).unwrap();
        assert_eq!(content, Content { digest: Digest::of(b"words"), kind: ContentKind::File, size: 5, files: 1 });
        assert!(!path.exists());
        let blob = store.path_of(&content.digest);
        assert_eq!(fs::read_to_string(&blob).unwrap(), "words");
        assert_eq!(fs::metadata(&blob).unwrap().permissions().mode() & 0o777, 0o444);
        assert_eq!(store.check(&content).unwrap(), Health::Intact);
        assert_eq!(store.ingest(&staged(&store, 2, "words")).unwrap(), content, "a second time");
        assert_eq!(store.check(&content).unwrap(), Health::Intact);
    }

    #[test]
    fn an_untouched_blob_is_not_read_again() {
        let (_dir, store) = store();
        let content = ingested(&store, "words");
        // Replacing what is remembered shows whether the memory was asked.
        let known = store.blob_log.get(&content.digest).unwrap();
        assert_eq!(known.signature, look_at(&store.path_of(&content.digest)).unwrap().unwrap().0);
        store.ingest(&staged(&store, 2, "words")).unwrap();
        let known = store.blob_log.get(&content.digest).unwrap();
        assert_eq!(known.signature, look_at(&store.path_of(&content.digest)).unwrap().unwrap().0, "kept after a touch");
    }

    #[test]
    fn truncated_flipped_and_missing_blobs_are_found_at_once() {
        let (_dir, store) = store();
        for (text, change) in [
            ("cut short", (|bytes: &mut Vec<u8>| bytes.truncate(3)) as fn(&mut Vec<u8>)),
            ("one bit", |bytes| bytes[2] ^= 1),
            ("emptied", Vec::clear),
        ] {
            let content = ingested(&store, text);
            overwrite(&store.path_of(&content.digest), change);
            let Health::Damaged { quarantined: Some(aside), .. } = store.check(&content).unwrap() else {
                panic!("{text}")
            };
            assert!(aside.exists());
            assert_eq!(store.check(&content).unwrap(), Health::Missing(content.digest));
            assert_eq!(ingested(&store, text), content);
            assert_eq!(store.check(&content).unwrap(), Health::Intact);
        }
    }

    #[test]
    fn a_damaged_blob_that_another_moves_aside_or_replaces_is_no_error() {
        let (_dir, store) = store();
        let root = store.new_attempt(&key(1)).unwrap().join("folder");
        fs::create_dir_all(&root).unwrap();
        (0..200).for_each(|n| fs::write(root.join(n.to_string()), "all the same").unwrap());
        let folder = store.ingest(&root).unwrap();
        let blob = store.path_of(&Digest::of(b"all the same"));
        overwrite(&blob, |bytes| bytes[0] ^= 1);
        // Checked by several threads, of which one moves it.
        assert!(!store.check(&folder).unwrap().is_intact());
        let content = ingested(&store, "all the same");
        assert_eq!(store.check(&folder).unwrap(), Health::Intact);
        // Found damaged before another brought a good one.
        let other = Signature { inode: 0, ..look_at(&blob).unwrap().unwrap().0 };
        assert_eq!(store.quarantine(&content.digest, &blob, &other).unwrap(), Health::Intact);
        assert_eq!(fs::read_to_string(&blob).unwrap(), "all the same");
    }

    #[test]
    fn an_edit_that_restores_the_modification_time_is_found() {
        let (_dir, store) = store();
        let content = ingested(&store, "words");
        let blob = store.path_of(&content.digest);
        let times = fs::metadata(&blob).unwrap().modified().unwrap();
        overwrite(&blob, |bytes| bytes[0] ^= 1);
        OpenOptions::new().write(true).open(&blob).unwrap().set_modified(times).unwrap();
        assert!(matches!(store.check(&content).unwrap(), Health::Damaged { .. }));
    }

    #[test]
    fn what_another_process_remembers_is_used() {
        let (dir, store) = store();
        let content = ingested(&store, "words");
        let again = Store::open(&dir.path().join("store"), Access::Read).unwrap();
        assert!(again.blob_log.get(&content.digest).is_some());
        assert_eq!(again.check(&content).unwrap(), Health::Intact);
        overwrite(&store.path_of(&content.digest), |bytes| bytes[0] ^= 1);
        let unmoved = Health::Damaged { digest: content.digest, quarantined: None };
        assert_eq!(again.check(&content).unwrap(), unmoved);
        assert!(store.path_of(&content.digest).exists());
    }

    #[test]
    fn a_store_without_its_index_still_checks() {
        let (dir, first) = store();
        let content = ingested(&first, "words");
        drop(first);
        fs::remove_dir_all(dir.path().join("store/index")).unwrap();
        let store = Store::open(&dir.path().join("store"), Access::Write).unwrap();
        assert_eq!(store.check(&content).unwrap(), Health::Intact);
        assert!(store.blob_log.get(&content.digest).is_some());
    }

    #[test]
    fn folders_come_in_whole_with_links_resolved() {
        let (dir, store) = store();
        let root = store.new_attempt(&key(1)).unwrap().join("model");
        fs::create_dir_all(root.join("sub/empty")).unwrap();
        fs::write(root.join("config.json"), "{}").unwrap();
        fs::write(root.join("sub/same.json"), "{}").unwrap();
        fs::write(dir.path().join("outside"), "kept").unwrap();
        symlink(dir.path().join("outside"), root.join("link")).unwrap();
        symlink("config.json", root.join("inner-link")).unwrap();
        fs::hard_link(dir.path().join("outside"), root.join("second-name")).unwrap();
        let content = store.ingest(&root).unwrap();
        assert!(!root.exists());
        assert_eq!(fs::read_to_string(dir.path().join("outside")).unwrap(), "kept");
        let mode = fs::metadata(dir.path().join("outside")).unwrap().permissions().mode();
        assert_ne!(mode & 0o200, 0, "a file with names elsewhere is copied, not sealed");
        assert_eq!((content.files, content.size, content.kind), (5, 14, ContentKind::Folder));
        let manifest = store.manifest(&content.digest).unwrap();
        let paths: Vec<_> = manifest.entries().iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["config.json", "inner-link", "link", "second-name", "sub/empty", "sub/same.json"]);
        assert_eq!(store.check(&content).unwrap(), Health::Intact);
        overwrite(&store.path_of(&Digest::of(b"{}")), |bytes| bytes[0] ^= 1);
        assert!(matches!(store.check(&content).unwrap(), Health::Damaged { .. }));
    }

    #[test]
    fn a_linked_output_leaves_its_target_alone() {
        let (dir, store) = store();
        let target = dir.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("a"), "1").unwrap();
        let out = store.new_attempt(&key(1)).unwrap().join("out");
        symlink(&target, &out).unwrap();
        let folder = store.ingest(&out).unwrap();
        assert_eq!((folder.files, out.is_symlink(), target.join("a").exists()), (1, false, true));
        symlink(target.join("a"), &out).unwrap();
        let file = store.ingest(&out).unwrap();
        assert_eq!((file.digest, out.is_symlink(), target.join("a").exists()), (Digest::of(b"1"), false, true));
    }

    #[test]
    fn special_files_are_refused() {
        let (_dir, store) = store();
        let path = store.new_attempt(&key(1)).unwrap().join("s");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(store.ingest(&path), Err(StoreError::Special { what: "a socket", .. })));
        assert!(matches!(store.ingest(Path::new("/dev/null")), Err(StoreError::Special { what: "a device", .. })));
    }
}
