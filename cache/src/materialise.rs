//! Putting content where people and programs can open it: into `out/` under a path, and into an attempt's folder as an
//! input with a readable name.
//!
//! In `out/`: a reflink where the disk has them, else a hard link, else a copy. Reflinks and copies are the user's to
//! edit; a hard link is read-only and is the blob itself, so an edit that insists is found by the blob's signature.
//! Inputs of attempts are symbolic links: a hard link would change the blob's ctime twice per use.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use crate::blobs::look_at;
use crate::content::{Content, ContentKind, FolderManifest};
use crate::digest::Digest;
use crate::signature::Signature;
use crate::signature_log::Remembered;
use crate::steps::{Step, reach};
use crate::store::{Store, move_away, temporary_in};
use crate::walk::{Walked, WalkedKind, walk};
use crate::{Result, StoreError};

/// How a file was put in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    Reflink,
    HardLink,
    Copy,
}

/// What [`Store::materialise`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Materialised {
    /// The destination was this content already.
    AlreadyThere,
    /// It was placed; for a folder, `Placement` is that of its last file.
    Placed(Placement),
}

impl Store {
    /// Makes `dest` this content, replacing whatever is there at once. The content must be in the store.
    pub fn materialise(&self, content: &Content, dest: &Path) -> Result<Materialised> {
        self.require_write()?;
        match content.kind {
            ContentKind::File => {
                if self.is_placed(&content.digest, dest)? {
                    return Ok(Materialised::AlreadyThere);
                }
                let folder = folder_of(dest)?;
                // A path that must not exist yet, next to the destination so that it can be renamed.
                let staged = temporary_in(folder)
                    .or_else(|error| match error.kind() {
                        io::ErrorKind::NotFound => fs::create_dir_all(folder).and_then(|()| temporary_in(folder)),
                        _ => Err(error),
                    })
                    .map_err(StoreError::while_doing("create a file in", folder))?
                    .into_temp_path();
                fs::remove_file(&staged).map_err(StoreError::while_doing("remove", &staged))?;
                let placement = self.place(&content.digest, &staged)?;
                // A rename changes the ctime too, and a hard link is the blob itself.
                self.keep_signature(&content.digest, || self.replace_file(&staged, dest))?;
                reach(Step::OutPlaced, dest)?;
                self.remember_place(&content.digest, dest, placement)?;
                Ok(Materialised::Placed(placement))
            }
            ContentKind::Folder => {
                let manifest = self.manifest(&content.digest)?;
                if self.is_folder_placed(&manifest, dest)? {
                    return Ok(Materialised::AlreadyThere);
                }
                self.place_folder(&manifest, dest).map(Materialised::Placed)
            }
        }
    }

    /// Links a content into an attempt's folder under a readable name. Nothing may be at `dest` yet.
    pub fn stage_input(&self, content: &Content, dest: &Path) -> Result<()> {
        let folder = folder_of(dest)?;
        fs::create_dir_all(folder).map_err(StoreError::while_doing("create the folder", folder))?;
        let link = |digest: &Digest, dest: &Path| {
            symlink(self.path_of(digest), dest).map_err(StoreError::while_doing("link", dest))
        };
        if content.kind == ContentKind::File {
            return link(&content.digest, dest);
        }
        self.lay_out(&self.manifest(&content.digest)?, dest, |digest, path| link(digest, path))
    }

    /// Whether `dest` is the blob itself, or a copy of it that nobody has touched.
    fn is_placed(&self, digest: &Digest, dest: &Path) -> Result<bool> {
        let Some((found, true)) = look_at(dest)? else { return Ok(false) };
        self.is_placed_file(digest, dest, &found)
    }

    fn is_placed_file(&self, digest: &Digest, dest: &Path, found: &Signature) -> Result<bool> {
        // The blob's signature was looked up a moment ago by whoever checked the content.
        if let Some(blob) = self.blob_log.get(digest)
            && (blob.signature.device, blob.signature.inode) == (found.device, found.inode)
        {
            return Ok(true);
        }
        let same_file = |blob: Signature| (blob.device, blob.inode) == (found.device, found.inode);
        if look_at(&self.path_of(digest))?.is_some_and(|(blob, _)| same_file(blob)) {
            return Ok(true);
        }
        let known = self.place_log.get(&place_key(dest)?);
        Ok(known.is_some_and(|known| known.digest == *digest && known.signature == *found))
    }

    /// Makes a new name for the blob's content at `dest`, where nothing is.
    fn place(&self, digest: &Digest, dest: &Path) -> Result<Placement> {
        let blob = self.path_of(digest);
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound && !blob.exists();
        if !self.no_reflink.load(Ordering::Relaxed) {
            match reflink_copy::reflink(&blob, dest) {
                Ok(()) => return Ok(Placement::Reflink),
                Err(error) if gone(&error) => return Err(StoreError::Missing { digest: *digest }),
                Err(_) => self.no_reflink.store(true, Ordering::Relaxed),
            }
            let _ = fs::remove_file(dest);
        }
        match self.keep_signature(digest, || Ok(fs::hard_link(&blob, dest)))? {
            Ok(()) => return Ok(Placement::HardLink),
            Err(error) if gone(&error) => return Err(StoreError::Missing { digest: *digest }),
            // Another disk, too many links, a file of another user: a copy does.
            Err(_) => {}
        }
        let copy = || -> io::Result<()> {
            let mut to = fs::File::create_new(dest)?;
            io::copy(&mut fs::File::open(&blob)?, &mut to)?;
            Ok(())
        };
        copy().map(|()| Placement::Copy).map_err(StoreError::while_doing("copy out of the store to", dest))
    }

    /// Renames over `dest`. The name that goes away may have been a link to another blob, whose ctime then changes.
    fn replace_file(&self, staged: &Path, dest: &Path) -> Result<()> {
        if fs::symlink_metadata(dest).is_ok_and(|there| there.is_dir()) {
            return self.swap(staged, dest);
        }
        self.keeping_old(dest, || {
            fs::rename(staged, dest).map_err(StoreError::while_doing("place", dest))?;
            // Two names of one file: rename leaves both.
            let _ = fs::remove_file(staged);
            Ok(())
        })
    }

    fn keeping_old<T>(&self, dest: &Path, change: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.place_log.get(&place_key(dest)?) {
            Some(old) => self.keep_signature(&old.digest, change),
            None => change(),
        }
    }

    /// Puts `staged` where `dest` is, at once where the kernel can exchange names, and removes what was there.
    fn swap(&self, staged: &Path, dest: &Path) -> Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let mut old = staged.to_path_buf();
        if renameat_with(CWD, staged, CWD, dest, RenameFlags::EXCHANGE).is_err() {
            old.set_extension("old");
            // Another run may have moved it.
            let moved = move_away(dest, &old)?;
            fs::rename(staged, dest).map_err(StoreError::while_doing("place", dest))?;
            if !moved {
                return Ok(());
            }
        }
        self.remove_old(&old, dest)
    }

    /// Removes what lay at `dest` until it was moved to `old`. Each link to a blob that goes changes the blob's ctime.
    fn remove_old(&self, old: &Path, dest: &Path) -> Result<()> {
        if !fs::symlink_metadata(old).is_ok_and(|there| there.is_dir()) {
            return self.keeping_old(dest, || fs::remove_file(old).map_err(StoreError::while_doing("remove", old)));
        }
        for entry in crate::record::list(old)? {
            self.remove_old(&entry.path(), &dest.join(entry.file_name()))?;
        }
        fs::remove_dir(old).map_err(StoreError::while_doing("remove", old))
    }

    fn remember_place(&self, digest: &Digest, dest: &Path, placement: Placement) -> Result<()> {
        if let Some((signature, _)) = look_at(dest)? {
            // Of a hard link only the digest matters: its blob has the signature.
            let signature =
                if placement == Placement::HardLink { Signature { ctime: 0, ..signature } } else { signature };
            self.place_log.put(place_key(dest)?, Remembered { digest: *digest, signature, on_disk: false });
        }
        Ok(())
    }

    fn is_folder_placed(&self, manifest: &FolderManifest, dest: &Path) -> Result<bool> {
        if !fs::symlink_metadata(dest).is_ok_and(|there| there.is_dir()) {
            return Ok(false);
        }
        // A link that dangles or a loop means at least that it is not what was placed.
        let Ok(walked) = walk(dest) else { return Ok(false) };
        if walked.len() != manifest.entries().len() {
            return Ok(false);
        }
        for (Walked { path, kind }, entry) in walked.iter().zip(manifest.entries()) {
            let same = path == &entry.path
                && match (kind, &entry.digest) {
                    (WalkedKind::EmptyFolder, None) => true,
                    (WalkedKind::File { signature, linked: false }, Some(digest)) => {
                        self.is_placed_file(digest, &dest.join(path), signature)?
                    }
                    _ => false,
                };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn place_folder(&self, manifest: &FolderManifest, dest: &Path) -> Result<Placement> {
        let folder = folder_of(dest)?;
        fs::create_dir_all(folder).map_err(StoreError::while_doing("create the folder", folder))?;
        let staged = tempfile::Builder::new()
            .prefix(".grlm-")
            .tempdir_in(folder)
            .map_err(StoreError::while_doing("create a folder in", folder))?;
        let inner = staged.path().join("new");
        let mut last = Placement::HardLink;
        let mut placed: Vec<(Digest, PathBuf, Placement)> = Vec::new();
        self.lay_out(manifest, &inner, |digest, path| {
            last = self.place(digest, path)?;
            let relative = path.strip_prefix(&inner).unwrap_or(path);
            placed.push((*digest, dest.join(relative), last));
            Ok(())
        })?;
        // Another run may place the same at this moment: what is there now counts, not what was there.
        match fs::rename(&inner, dest) {
            Err(_) if fs::symlink_metadata(dest).is_ok() => self.swap(&inner, dest)?,
            placed => placed.map_err(StoreError::while_doing("place", dest))?,
        }
        for (digest, path, placement) in &placed {
            self.remember_place(digest, path, *placement)?;
        }
        Ok(last)
    }

    /// Makes the folders of a manifest under `dest` and calls `put` for each file.
    fn lay_out(
        &self,
        manifest: &FolderManifest,
        dest: &Path,
        mut put: impl FnMut(&Digest, &Path) -> Result<()>,
    ) -> Result<()> {
        let make =
            |folder: &Path| fs::create_dir_all(folder).map_err(StoreError::while_doing("create the folder", folder));
        make(dest)?;
        let mut made = dest.to_path_buf();
        for entry in manifest.entries() {
            let path = dest.join(&entry.path);
            let folder = if entry.digest.is_some() { folder_of(&path)? } else { &path };
            if folder != made {
                make(folder)?;
                made = folder.to_path_buf();
            }
            if let Some(digest) = &entry.digest {
                put(digest, &path)?;
            }
        }
        Ok(())
    }
}

fn folder_of(dest: &Path) -> Result<&Path> {
    match dest.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(folder) => Ok(folder),
        None => Err(StoreError::io("replace", dest, io::ErrorKind::InvalidInput.into())),
    }
}

/// Places are remembered by their absolute path.
fn place_key(dest: &Path) -> Result<Digest> {
    let absolute = std::path::absolute(dest).map_err(StoreError::while_doing("resolve", dest))?;
    Ok(Digest::of(absolute.as_os_str().as_encoded_bytes()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::Health;
    use crate::testing::{ingested, key, store};

    fn is_remembered(store: &Store, digest: &Digest) -> bool {
        let (there, _) = look_at(&store.path_of(digest)).unwrap().unwrap();
        store.blob_log.get(digest).is_some_and(|known| known.signature == there)
    }

    #[test]
    fn a_file_is_placed_once_and_its_blob_stays_known() {
        let (dir, store) = store();
        let content = ingested(&store, "words");
        let dest = dir.path().join("out/stage/out.txt");
        assert!(matches!(store.materialise(&content, &dest).unwrap(), Materialised::Placed(_)));
        assert_eq!(fs::read_to_string(&dest).unwrap(), "words");
        assert!(is_remembered(&store, &content.digest), "linking does not cause a rehash");
        assert_eq!(store.materialise(&content, &dest).unwrap(), Materialised::AlreadyThere);
        let names: Vec<_> = fs::read_dir(dest.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing temporary is left");
    }

    #[test]
    fn replacing_a_file_keeps_the_old_blob_known() {
        let (dir, store) = store();
        let (old, new) = (ingested(&store, "old"), ingested(&store, "new"));
        let dest = dir.path().join("out.txt");
        for content in [&old, &new, &old] {
            assert!(matches!(store.materialise(content, &dest).unwrap(), Materialised::Placed(_)));
            assert!(is_remembered(&store, &old.digest) && is_remembered(&store, &new.digest));
        }
        assert_eq!(fs::read_to_string(&dest).unwrap(), "old");
    }

    #[test]
    fn an_edit_in_out_is_found_and_repaired() {
        let (dir, store) = store();
        let content = ingested(&store, "words");
        let dest = dir.path().join("out.txt");
        store.materialise(&content, &dest).unwrap();
        fs::set_permissions(&dest, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&dest, "w0rds").unwrap();
        if matches!(store.check(&content).unwrap(), Health::Damaged { .. }) {
            assert_eq!(ingested(&store, "words"), content);
        }
        assert!(matches!(store.materialise(&content, &dest).unwrap(), Materialised::Placed(_)));
        assert_eq!(fs::read_to_string(&dest).unwrap(), "words");
    }

    #[test]
    fn a_copy_is_known_by_its_signature() {
        let (dir, store) = store();
        let content = ingested(&store, "words");
        let dest = dir.path().join("out.txt");
        fs::copy(store.path_of(&content.digest), &dest).unwrap();
        assert!(!store.is_placed(&content.digest, &dest).unwrap());
        store.remember_place(&content.digest, &dest, Placement::Copy).unwrap();
        assert!(store.is_placed(&content.digest, &dest).unwrap());
        fs::set_permissions(&dest, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&dest, "words").unwrap();
        assert!(!store.is_placed(&content.digest, &dest).unwrap());
    }

    #[test]
    fn folders_replace_files_and_files_replace_folders() {
        let (dir, store) = store();
        let root = store.new_attempt(&key(1)).unwrap().join("model");
        fs::create_dir_all(root.join("a/empty")).unwrap();
        fs::write(root.join("a/x"), "1").unwrap();
        fs::write(root.join("y"), "2").unwrap();
        let folder = store.ingest(&root).unwrap();
        let file = ingested(&store, "3");
        let dest = dir.path().join("out/thing");
        for _ in 0..2 {
            assert!(matches!(store.materialise(&folder, &dest).unwrap(), Materialised::Placed(_)));
            assert_eq!(store.digest(&dest).unwrap(), folder);
            assert_eq!(store.materialise(&folder, &dest).unwrap(), Materialised::AlreadyThere);
            assert!(is_remembered(&store, &Digest::of(b"1")));
            fs::write(dest.join("stray"), "").unwrap();
            assert!(matches!(store.materialise(&folder, &dest).unwrap(), Materialised::Placed(_)));
            assert_eq!(store.digest(&dest).unwrap(), folder);
            store.materialise(&file, &dest).unwrap();
            assert_eq!(fs::read_to_string(&dest).unwrap(), "3");
        }
        assert_eq!(fs::read_dir(dest.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn inputs_are_staged_without_touching_the_blob() {
        let (dir, store) = store();
        let root = store.new_attempt(&key(1)).unwrap().join("model");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("sub/x"), "1").unwrap();
        let folder = store.ingest(&root).unwrap();
        let before = fs::metadata(store.path_of(&Digest::of(b"1"))).unwrap().ctime_nsec();
        store.stage_input(&folder, &dir.path().join("in/model")).unwrap();
        store.stage_input(&ingested(&store, "1"), &dir.path().join("in/x.json")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("in/model/sub/x")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.path().join("in/x.json")).unwrap(), "1");
        fs::remove_dir_all(dir.path().join("in/model")).unwrap();
        let _ = before;
        assert!(is_remembered(&store, &Digest::of(b"1")));
    }

    #[test]
    fn a_missing_blob_is_an_error_that_says_so() {
        let (dir, store) = store();
        let content = ingested(&store, "words");
        fs::remove_file(store.path_of(&content.digest)).unwrap();
        let error = store.materialise(&content, &dir.path().join("out.txt")).unwrap_err();
        assert!(matches!(error, StoreError::Missing { .. }), "{error}");
        assert!(!dir.path().join("out.txt").exists());
    }
}
