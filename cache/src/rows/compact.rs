//! Merging many small segments into one: an attempt of a few rows leaves a segment of a few rows.
//!
//! Only segments that nobody writes are taken (their locks are held meanwhile). The new one is on disk and in its place
//! before the old ones go, so a kill in between leaves rows twice, never none. One process at a time compacts a
//! namespace; another that would like to goes on without.
//!
//! The lock's file counts compactions, a byte for each, between the new segment's place and the removal of the old
//! ones. Who reads the same count before it lists the folder and after it read what is new there has missed nothing:
//! whatever was removed meanwhile was counted before the list, and so has its rows in a segment that the list has. A
//! segment that is opened later, since the index knew it, and is not there, is found to have vanished.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustc_hash::FxHashMap;

use crate::digest::Digest;
use crate::rows::namespace::{Chosen, Namespace};
use crate::rows::record::{self, Kind, SEGMENT_HEADER};
use crate::rows::segment::{self, SegmentId, Taking};
use crate::steps::synced;
use crate::store::{Access, temporary_in};
use crate::{Result, StoreError};

/// Segments from this size on are left alone.
const LARGE: u64 = 64 << 20;
/// So many small ones are too many.
const MANY: usize = 16;
/// Held by the process that compacts; as long as there were compactions.
pub(super) const LOCK: &str = "compact.lock";

/// How many compactions have removed segments of this namespace, or are about to.
pub(super) fn compactions(folder: &Path) -> Result<u64> {
    let path = folder.join(LOCK);
    // Opened, since a network disk may answer a mere look from memory.
    match File::open(&path).and_then(|file| file.metadata()) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(StoreError::io("look at", &path, error)),
    }
}

/// Takes the lock of compactions. It is gone when the whole namespace is.
pub(super) fn lock(folder: &Path) -> Result<Taking> {
    let path = folder.join(LOCK);
    segment::take(OpenOptions::new().append(true).create(true).open(&path), &path)
}

impl Namespace {
    /// Merges small segments if there are many of them; returns how many were merged.
    pub fn compact_if_needed(&mut self) -> Result<usize> {
        let small: Vec<SegmentId> =
            segment::list(&self.folder)?.into_iter().filter(|(_, size)| *size < LARGE).map(|(id, _)| id).collect();
        if self.access == Access::Read || small.len() < MANY { Ok(0) } else { self.merge(small, true) }
    }

    /// Merges all segments that nobody writes, and drops what is there twice or damaged; returns how many were merged.
    pub fn compact(&mut self) -> Result<usize> {
        self.merge(segment::list(&self.folder)?.into_iter().map(|(id, _)| id).collect(), true)
    }

    /// Forgets which rows failed, and why; returns whether it could look at all segments.
    ///
    /// # Errors
    /// [`StoreError::NoLocks`]; what is read or written fails.
    pub fn drop_failures(&mut self) -> Result<bool> {
        if matches!(lock(&self.folder)?, Taking::Unknown) {
            return Err(StoreError::NoLocks { path: self.folder.clone() });
        }
        let all = segment::list(&self.folder)?;
        Ok(self.merge(all.iter().map(|(id, _)| id.clone()).collect(), false)? == all.len())
    }

    fn merge(&mut self, ids: Vec<SegmentId>, failures: bool) -> Result<usize> {
        if self.access == Access::Read {
            return Err(StoreError::OpenedForReading { root: self.folder.clone() });
        }
        if ids.is_empty() {
            return Ok(0);
        }
        let Taking::Taken(mut lock) = lock(&self.folder)? else { return Ok(0) };
        self.remove_leftovers();
        let mut closed: Vec<(SegmentId, File)> = Vec::new();
        for id in ids {
            if let Taking::Taken(file) = segment::lock_closed(&self.folder, &id)? {
                closed.push((id, file));
            }
        }
        if closed.is_empty() {
            return Ok(0);
        }
        let wanted = self.whole_records(&closed, failures)?;
        if !wanted.is_empty() {
            self.write_merged(&closed, &wanted)?;
        }
        // Synced: on a network disk another host sees it no later than what is removed.
        let counted = lock.write_all(b".").and_then(|()| lock.sync_all());
        counted.map_err(StoreError::while_doing("write", &self.folder.join(LOCK)))?;
        for (id, _) in &closed {
            let path = id.path(&self.folder);
            fs::remove_file(&path).map_err(StoreError::while_doing("remove", &path))?;
        }
        self.view.reload()?;
        self.view.write_index(true);
        Ok(closed.len())
    }

    /// What a killed compaction left behind. Only the holder of the lock writes such files.
    fn remove_leftovers(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".grlm-") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// For each distinct row the record to keep, in the order in which they lie. Damaged ones are not among them.
    fn whole_records(&self, closed: &[(SegmentId, File)], failures: bool) -> Result<Vec<Chosen>> {
        let mut chosen: FxHashMap<Digest, Chosen> = FxHashMap::default();
        for (number, (id, file)) in closed.iter().enumerate() {
            let path = id.path(&self.folder);
            let mut all = Vec::new();
            let see = |place, header: record::Header| {
                all.push((header.key, Chosen { kind: header.kind, segment: number, place, length: header.length }));
            };
            record::scan(file, 0, see).map_err(StoreError::while_doing("read", &path))?;
            for (key, this) in all {
                let replaces = chosen.get(&key).is_none_or(|c| c.kind == Kind::Failure || this.kind == Kind::Result);
                let keep = this.kind == Kind::Result || failures;
                if replaces && keep && read(file, &this).map_err(StoreError::while_doing("read", &path))?.is_some() {
                    chosen.insert(key, this);
                }
            }
        }
        let mut wanted: Vec<Chosen> = chosen.into_values().collect();
        wanted.sort_unstable_by_key(|c| (c.segment, c.place));
        Ok(wanted)
    }

    fn write_merged(&self, closed: &[(SegmentId, File)], wanted: &[Chosen]) -> Result<()> {
        let failed = || StoreError::while_doing("write a segment in", &self.folder);
        let mut out = BufWriter::with_capacity(1 << 20, temporary_in(&self.folder).map_err(failed())?);
        out.write_all(SEGMENT_HEADER).map_err(failed())?;
        for this in wanted {
            // Read and verified a moment ago; should it be damaged since, it is left out.
            if let Some(bytes) = read(&closed[this.segment].1, this).map_err(failed())? {
                out.write_all(&bytes).map_err(failed())?;
            }
        }
        let staged = out.into_inner().map_err(|error| failed()(error.into_error()))?;
        staged.as_file().sync_all().map_err(failed())?;
        let path = SegmentId::fresh().path(&self.folder);
        staged.persist_noclobber(&path).map_err(|error| StoreError::io("place", &path, error.error))?;
        synced(&path);
        crate::sync::sync_path(&self.folder)
    }
}

/// A whole record's bytes; `None` if it is damaged.
fn read(file: &File, chosen: &Chosen) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; record::RECORD_HEADER + chosen.length];
    file.read_exact_at(&mut bytes, chosen.place)?;
    let whole = record::header(&bytes).is_some_and(|header| record::payload(&bytes, &header).is_some());
    Ok(whole.then_some(bytes))
}
