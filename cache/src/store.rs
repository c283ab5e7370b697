//! The store's folder: its layout, its version, and how it is opened. Opening reads one small file and nothing else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;

use crate::signature_log::SignatureLog;
use crate::stat_index::StatIndex;
use crate::sync::Pending;
use crate::{Result, StoreError};

/// The version that this program writes, and the newest that it reads.
pub const STORE_VERSION: u64 = 1;

/// What a store is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Makes the store if there is none.
    Write,
    /// Changes nothing, so that a store on a read-only disk can be looked at.
    Read,
}

/// An open store. Any number of threads may use it, and any number of processes may have the same one open.
pub struct Store {
    pub(crate) root: PathBuf,
    pub(crate) access: Access,
    /// Signatures of blobs, by digest.
    pub(crate) blob_log: SignatureLog,
    /// Signatures of copies in `out/`, by the hash of their path.
    pub(crate) place_log: SignatureLog,
    pub(crate) index: StatIndex,
    pub(crate) pending: Pending,
    /// Bytes of inputs hashed so far without asking the index.
    pub(crate) hashed_unasked: AtomicU64,
    /// The disk said that it knows no reflinks; asking again for each file would cost a call.
    pub(crate) no_reflink: AtomicBool,
    /// Bytes of new blobs that were not yet added to the size.
    pub(crate) ingested: AtomicU64,
    /// The disk said that it knows no locks: claims stand in for them.
    pub(crate) no_flock: AtomicBool,
}

const CACHEDIR_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
# This folder is a store of grlm: everything in it can be made again by running its pipelines.\n";

impl Store {
    /// Opens the store at `root`.
    ///
    /// # Errors
    /// A store of a newer version; with [`Access::Write`] one that cannot be written; with [`Access::Read`] none at all.
    pub fn open(root: &Path, access: Access) -> Result<Store> {
        let root = std::path::absolute(root).map_err(StoreError::while_doing("resolve", root))?;
        let version_path = root.join("VERSION");
        match fs::read_to_string(&version_path) {
            Ok(text) => check_version(&root, &text)?,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                match access {
                    Access::Read => return Err(StoreError::Absent { root }),
                    Access::Write => create(&root)?,
                }
            }
            Err(error) => return Err(StoreError::io("read", &version_path, error)),
        }
        if access == Access::Write {
            rustix::fs::access(&root, rustix::fs::Access::WRITE_OK)
                .map_err(|error| StoreError::NotWritable { root: root.clone(), source: error.into() })?;
        }
        let writable = access == Access::Write;
        let index = root.join("index").join(host_name());
        Ok(Store {
            blob_log: SignatureLog::new(index.join("blobs.log"), writable),
            place_log: SignatureLog::new(index.join("places.log"), writable),
            index: StatIndex::new(index, writable),
            root,
            access,
            pending: Pending::default(),
            hashed_unasked: AtomicU64::new(0),
            no_reflink: AtomicBool::new(false),
            no_flock: AtomicBool::new(false),
            ingested: AtomicU64::new(0),
        })
    }

    /// Whether `root` is a store, or one can be made there.
    ///
    /// # Errors
    /// It holds other things, or cannot be looked into.
    pub fn check_place(root: &Path) -> Result<()> {
        let found = foreign(root).map_err(StoreError::while_doing("look into", root))?;
        // One that somebody else has completed meanwhile holds more than a beginning does.
        match found.filter(|_| !root.join("VERSION").exists()) {
            Some(found) => Err(StoreError::Occupied { root: root.to_path_buf(), found }),
            None => Ok(()),
        }
    }

    /// The store's folder, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the engine keeps the plans, events and logs of runs.
    pub fn runs_dir(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Brings everything published so far to the disk; what fails here was published and may not survive a power cut.
    pub fn sync(&self) -> Result<()> {
        self.pending.flush(&self.root)
    }

    pub(crate) fn require_write(&self) -> Result<()> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => Err(StoreError::OpenedForReading { root: self.root.clone() }),
        }
    }

    /// A temporary file on the store's disk with the mode of an ordinary file.
    pub(crate) fn temporary(&self) -> Result<tempfile::NamedTempFile> {
        self.require_write()?;
        let folder = self.root.join("tmp");
        let make = || temporary_in(&folder);
        make()
            .or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => fs::create_dir_all(&folder).and_then(|()| make()),
                _ => Err(error),
            })
            .map_err(StoreError::while_doing("create a file in", &folder))
    }
}

/// How temporary files begin.
const TEMPORARY: &str = ".grlm-";

/// With the mode that the user's umask gives, not the private one of temporary files: a store may be shared.
pub(crate) fn temporary_in(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().prefix(TEMPORARY).permissions(fs::Permissions::from_mode(0o666)).tempfile_in(folder)
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.sync() {
            tracing::error!(%error, "what was published last may not survive a power cut");
        }
    }
}

fn check_version(root: &Path, text: &str) -> Result<()> {
    match text.trim().parse::<u64>() {
        Ok(found) if found > STORE_VERSION => {
            Err(StoreError::NewerVersion { root: root.to_path_buf(), found, supported: STORE_VERSION })
        }
        Ok(_) => Ok(()),
        Err(_) => Err(StoreError::NotAStore { root: root.to_path_buf(), found: text.chars().take(40).collect() }),
    }
}

/// What a new store begins with.
const FOLDERS: [&str; 5] = ["blobs", "actions", "runs", "scratch", "tmp"];

/// Something in the folder that no beginning of a store has: a store that somebody else creates at this moment, or
/// whose creation was cut off, may be completed.
fn foreign(root: &Path) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // The root of a disk has a lost+found.
        let ours = FOLDERS.iter().chain(&["VERSION", "CACHEDIR.TAG", "lost+found"]).any(|known| *known == name);
        if !ours && !name.starts_with(TEMPORARY) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// VERSION comes last and whole, so that a folder with a VERSION is a store.
fn create(root: &Path) -> Result<()> {
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreError::NotWritable { root: root.to_path_buf(), source }
        }
        _ => StoreError::io("create the store", root, source),
    };
    Store::check_place(root)?;
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder)).map_err(refused)?;
    }
    fs::write(root.join("CACHEDIR.TAG"), CACHEDIR_TAG).map_err(refused)?;
    let staged = temporary_in(root).map_err(refused)?;
    fs::write(staged.path(), format!("{STORE_VERSION}\n")).map_err(refused)?;
    // Empty after a power cut, it would make the folder look like somebody else's.
    staged.as_file().sync_all().map_err(refused)?;
    staged.persist(root.join("VERSION")).map_err(|error| refused(error.error))?;
    crate::sync::sync_path(root)
}

/// Inode and device numbers mean something on one host only, so each has its own index.
pub(crate) fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let safe: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect();
    if safe.is_empty() { "localhost".to_owned() } else { safe }
}

/// Renames, making the target's folder if it is missing.
pub(crate) fn rename_into(from: &Path, to: &Path) -> Result<()> {
    let moved = fs::rename(from, to).or_else(|error| match (error.kind(), to.parent()) {
        (io::ErrorKind::NotFound, Some(folder)) => fs::create_dir_all(folder).and_then(|()| fs::rename(from, to)),
        _ => Err(error),
    });
    moved.map_err(StoreError::while_doing("place", to))
}

/// The same; whether it was there to be moved.
pub(crate) fn move_away(from: &Path, to: &Path) -> Result<bool> {
    match rename_into(from, to) {
        Ok(()) => Ok(true),
        Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_other_things_becomes_no_store_and_one_that_was_begun_does() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = folder.path().join("theirs");
        fs::create_dir_all(theirs.join("blobs")).unwrap();
        fs::write(theirs.join("thesis.tex"), "").unwrap();
        let error = Store::open(&theirs, Access::Write).err().unwrap();
        assert!(matches!(&error, StoreError::Occupied { found, .. } if found == "thesis.tex"), "{error}");
        assert!(Store::check_place(&theirs).is_err() && Store::check_place(&folder.path().join("new")).is_ok());
        assert!(error.help().unwrap().contains("--store"));
        assert_eq!(fs::read_dir(&theirs).unwrap().count(), 2, "nothing was added");
        let begun = folder.path().join("begun");
        fs::create_dir_all(begun.join("actions")).unwrap();
        fs::write(begun.join(".grlm-x1y2"), "").unwrap();
        assert!(Store::open(&begun, Access::Write).is_ok());
    }

    #[test]
    fn a_new_store_is_tagged_and_versioned() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        assert!(matches!(Store::open(&root, Access::Read), Err(StoreError::Absent { .. })));
        drop(Store::open(&root, Access::Write).unwrap());
        drop(Store::open(&root, Access::Write).unwrap());
        drop(Store::open(&root, Access::Read).unwrap());
        assert_eq!(fs::read_to_string(root.join("VERSION")).unwrap(), "1\n");
        assert!(
            fs::read_to_string(root.join("CACHEDIR.TAG"))
                .unwrap()
                .starts_with("Signature: 8a477f597d28d172789f06886806bc55")
        );
    }

    #[test]
    fn newer_and_foreign_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("VERSION"), "2\n").unwrap();
        let error = Store::open(dir.path(), Access::Read).err().unwrap();
        assert!(matches!(error, StoreError::NewerVersion { found: 2, supported: 1, .. }));
        assert!(error.help().is_some());
        fs::write(dir.path().join("VERSION"), "banana").unwrap();
        assert!(matches!(Store::open(dir.path(), Access::Write), Err(StoreError::NotAStore { .. })));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(Store::open(&dir.path().join("file"), Access::Write).is_err());
    }

    #[test]
    fn a_store_opened_for_reading_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path(), Access::Write).unwrap());
        let store = Store::open(dir.path(), Access::Read).unwrap();
        assert!(matches!(store.temporary(), Err(StoreError::OpenedForReading { .. })));
    }
}
