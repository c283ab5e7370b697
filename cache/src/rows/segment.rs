//! A segment: one file of records, written by one attempt from its first to its last row and never again.
//!
//! Its writer holds a lock on it, so that compaction leaves it alone; the kernel frees the lock when the writer dies.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::rows::record::SEGMENT_HEADER;
use crate::signature::now;
use crate::steps::{Step, reach, synced};
use crate::{Result, StoreError};

const EXTENSION: &str = "rows";
/// Between two syncs of a segment that is being written: what a power cut may cost.
const SYNC_EVERY: Duration = Duration::from_secs(2);

/// Longer than a kernel keeps what was written to itself (30 seconds by default on Linux).
const WRITTEN_BACK: Duration = Duration::from_secs(120);

/// A segment's name without its extension: unique, and in the order of creation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentId(pub String);

impl SegmentId {
    /// A name that no other segment has.
    pub fn fresh() -> SegmentId {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let milliseconds = now() / 1_000_000;
        // Two hosts may give the same process number at the same time.
        let salt = blake3::hash(crate::store::host_name().as_bytes());
        let salt = &salt.to_hex()[..6];
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        SegmentId(format!("{milliseconds:011x}-{salt}-{:x}-{count:x}", std::process::id()))
    }

    pub fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.{EXTENSION}", self.0))
    }
}

/// The segments of a folder and their sizes, in order of their names; none, if the folder is not there.
pub(crate) fn list(folder: &Path) -> Result<Vec<(SegmentId, u64)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", folder, error)),
    };
    let mut segments = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::while_doing("list", folder))?;
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION)
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
        {
            match fs::metadata(&path) {
                Ok(metadata) => segments.push((SegmentId(name.to_owned()), metadata.len())),
                // Compacted since the folder was read: see [`crate::rows::compact`].
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io("look at", &path, error)),
            }
        }
    }
    segments.sort_unstable();
    Ok(segments)
}

/// What came of taking a lock.
#[derive(Debug)]
pub(crate) enum Taking {
    Taken(File),
    /// Another has it.
    Others,
    /// The file is gone.
    Gone,
    /// The disk has no such locks, as NFS and Lustre may be mounted: nobody can know who writes.
    Unknown,
}

/// Takes the lock of a segment that nobody writes.
pub(crate) fn lock_closed(folder: &Path, id: &SegmentId) -> Result<Taking> {
    let path = id.path(folder);
    // NFS locks only what may be written; another user's segment is locked as far as the disk allows.
    let writable = OpenOptions::new().read(true).write(true).open(&path);
    let file = writable.or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => File::open(&path),
        _ => Err(error),
    });
    take(file, &path)
}

/// Takes the lock of a file that was opened at `path`.
pub(crate) fn take(file: io::Result<File>, path: &Path) -> Result<Taking> {
    let file = match file {
        Err(error) if is_gone(&error) => return Ok(Taking::Gone),
        file => file.map_err(StoreError::while_doing("open", path))?,
    };
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_at(&file, path) => return Ok(Taking::Taken(file)),
            Ok(()) => return Ok(Taking::Gone),
            Err(Errno::WOULDBLOCK) => return Ok(Taking::Others),
            Err(Errno::NOLCK | Errno::NOTSUP | Errno::NOSYS | Errno::BADF) => return Ok(Taking::Unknown),
            Err(Errno::INTR) => {}
            Err(error) => return Err(StoreError::io("lock", path, error.into())),
        }
    }
}

/// Removed; by another host (`ESTALE`) an open file too.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::StaleNetworkFileHandle)
}

/// Brings a segment to the disk if the kernel may not have done so by itself; returns whether it did. One that is gone
/// was compacted, which syncs.
pub(crate) fn sync_if_recent(path: &Path) -> Result<bool> {
    let is_recent = |time: SystemTime| time.elapsed().is_ok_and(|age| age < WRITTEN_BACK);
    match fs::metadata(path).and_then(|metadata| metadata.modified()) {
        Ok(modified) if is_recent(modified) => {}
        _ => return Ok(false),
    }
    match File::open(path).and_then(|file| file.sync_data()) {
        Ok(()) => synced(path),
        Err(error) if is_gone(&error) => return Ok(false),
        Err(error) => return Err(StoreError::io("sync", path, error)),
    }
    Ok(true)
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(there)) => (held.dev(), held.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Appends to a segment of its own.
#[derive(Debug)]
pub(crate) struct Writer {
    pub id: SegmentId,
    path: PathBuf,
    pub file: File,
    /// Bytes that were written whole.
    pub length: u64,
    synced: u64,
    last_sync: Instant,
    folder_synced: bool,
}

impl Writer {
    /// Begins a segment, and makes the folder if it is missing.
    pub fn create(folder: &Path) -> Result<Writer> {
        loop {
            let id = SegmentId::fresh();
            let path = id.path(folder);
            let mut options = OpenOptions::new();
            options.read(true).append(true).create_new(true);
            let opened = options.open(&path).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => fs::create_dir_all(folder).and_then(|()| options.open(&path)),
                _ => Err(error),
            });
            let file = match opened {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(StoreError::io("create the segment", &path, error)),
            };
            // Between creation and lock a compaction may have taken the empty file for a dead one's. Where there are no
            // locks there are no compactions.
            let lock = file.try_clone().map_err(StoreError::while_doing("open", &path))?;
            if matches!(take(Ok(lock), &path)?, Taking::Others | Taking::Gone) {
                continue;
            }
            let length = SEGMENT_HEADER.len() as u64;
            let mut writer =
                Writer { id, path, file, length: 0, synced: 0, last_sync: Instant::now(), folder_synced: false };
            writer.append(SEGMENT_HEADER)?;
            debug_assert_eq!(writer.length, length);
            return Ok(writer);
        }
    }

    /// Writes whole records. After a failure the segment ends before them.
    pub fn append(&mut self, records: &[u8]) -> Result<()> {
        let written = self.file.write_all(records).map_err(StoreError::while_doing("append to", &self.path));
        if let Err(error) = written.and_then(|()| reach(Step::RowsAppended, &self.path)) {
            // What stays behind if this fails too is a torn tail, and nothing may follow it: the caller drops us.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length += records.len() as u64;
        if self.last_sync.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    /// Brings what was appended to the disk.
    pub fn sync(&mut self) -> Result<()> {
        if self.synced < self.length {
            self.file.sync_data().map_err(StoreError::while_doing("sync", &self.path))?;
            self.synced = self.length;
            synced(&self.path);
            reach(Step::RowsSynced, &self.path)?;
        }
        if !self.folder_synced
            && let Some(folder) = self.path.parent()
        {
            crate::sync::sync_path(folder)?;
            self.folder_synced = true;
        }
        self.last_sync = Instant::now();
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.sync() {
            tracing::error!(%error, "the rows computed last may not survive a power cut");
        }
    }
}
