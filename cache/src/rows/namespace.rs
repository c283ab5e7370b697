//! A namespace as one process uses it: looking rows up, appending to a segment of its own, claiming what it computes.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustc_hash::FxHashMap;

use crate::digest::Digest;
use crate::gc;
use crate::rows::claims::Claims;
use crate::rows::compact;
use crate::rows::record::{self, Kind};
use crate::rows::segment::{self, Taking, Writer};
use crate::rows::view::{self, Vanished, View};
use crate::store::Access;
use crate::{Result, StoreError};

/// Segments that vanish this often before they are opened have another reason than compaction.
const LOOKS: usize = 100;
/// Between two looks whether a compaction has ended.
const LOOK: Duration = Duration::from_millis(20);

/// An open namespace. It holds open files, and a lock on the segment that it writes, until it is dropped.
#[derive(Debug)]
pub struct Namespace {
    pub(super) folder: PathBuf,
    pub(super) access: Access,
    pub(super) view: View,
    writer: Option<Writer>,
    claims: Option<Claims>,
    /// A collector knows that it is used.
    dated: bool,
}

/// A row that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Result(Vec<u8>),
    /// Why it has none, in words.
    Failure(String),
}

/// What a namespace holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowStats {
    /// Distinct rows with a result.
    pub results: u64,
    /// Distinct rows that failed, and have no result since.
    pub failures: u64,
    pub segments: u64,
    /// Bytes on disk, without the index.
    pub bytes: u64,
    /// Bytes of results.
    pub payload: u64,
}

impl Namespace {
    pub(super) fn open(folder: PathBuf, index: PathBuf, access: Access) -> Result<Namespace> {
        let mut view = View::open(&folder, &index)?;
        if access == Access::Write {
            view.write_index(false);
        }
        Ok(Namespace { folder, access, view, writer: None, claims: None, dated: false })
    }

    /// The results that are there, in the order of `keys`, whoever appended them. A damaged one is not.
    pub fn look_up(&mut self, keys: &[Digest]) -> Result<Vec<Option<Vec<u8>>>> {
        self.date();
        self.view.refresh()?;
        for _ in 0..LOOKS {
            match self.view.read(keys)? {
                Ok(results) => return Ok(results),
                Err(Vanished) => self.view.reload()?,
            }
        }
        Err(self.restless())
    }

    fn restless(&self) -> StoreError {
        StoreError::io("keep track of", &self.folder, io::ErrorKind::ResourceBusy.into())
    }

    /// Dates the folder when it is used, so that a collector does not take it for old: appending alone would not tell.
    fn date(&mut self) {
        if self.dated || self.access == Access::Read {
            return;
        }
        self.dated = true;
        let dated = fs::metadata(&self.folder).and_then(|metadata| metadata.modified());
        if dated.is_ok_and(|dated| dated.elapsed().is_ok_and(|age| age >= gc::fresh())) {
            // Who may not (another user's) looks rows up all the same.
            let _ = gc::date(&self.folder);
        }
    }

    /// Appends rows. What is appended survives a kill; see [`Namespace::sync`] for power cuts.
    ///
    /// # Errors
    /// None of these rows may be taken as kept.
    pub fn append<'a>(&mut self, rows: impl IntoIterator<Item = (Digest, RowRef<'a>)>) -> Result<()> {
        if self.access == Access::Read {
            return Err(StoreError::OpenedForReading { root: self.folder.clone() });
        }
        let mut bytes = Vec::new();
        let mut places = Vec::new();
        for (key, row) in rows {
            let (kind, payload) = match row {
                RowRef::Result(payload) => (Kind::Result, payload),
                RowRef::Failure(message) => (Kind::Failure, message.as_bytes()),
            };
            if payload.len() > record::LONGEST_PAYLOAD {
                return Err(StoreError::io("append to", &self.folder, io::ErrorKind::FileTooLarge.into()));
            }
            if kind == Kind::Result {
                places.push((key, bytes.len() as u64));
            }
            record::encode(kind, &key, payload, &mut bytes);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let mut writer = match self.writer.take() {
            Some(writer) => writer,
            None => Writer::create(&self.folder)?,
        };
        let start = writer.length;
        // A writer that failed is dropped: what follows begins a new segment.
        writer.append(&bytes)?;
        let placed = places.into_iter().map(|(key, offset)| (key, start + offset));
        self.view.appended(&writer.id, placed, writer.length);
        self.writer = Some(writer);
        Ok(())
    }

    /// Brings what was appended to the disk, and the index up to date if much is new.
    pub fn sync(&mut self) -> Result<()> {
        if let Some(writer) = &mut self.writer {
            writer.sync()?;
            self.view.write_index(false);
        }
        Ok(())
    }

    /// Closes the segment that is being written: it may be compacted from now on. Whatever this process found in others'
    /// segments is on disk as well: whoever appended it may have died before it came to that.
    pub fn close_segment(&mut self) -> Result<()> {
        self.sync()?;
        self.writer = None;
        if self.access == Access::Write {
            self.view.sync_recent()?;
        }
        Ok(())
    }

    /// Which of the rows this process may compute now: those that no other has claimed. They stay claimed until
    /// [`Namespace::release`], or until the namespace is dropped or the process ends.
    pub fn claim(&mut self, keys: &[Digest]) -> Result<Vec<bool>> {
        if self.access == Access::Read {
            return Ok(vec![true; keys.len()]);
        }
        let claims = match &mut self.claims {
            Some(claims) => claims,
            empty => empty.insert(Claims::open(&self.folder)?),
        };
        claims.claim(keys)
    }

    pub fn release(&mut self, keys: &[Digest]) {
        if let Some(claims) = &self.claims {
            keys.iter().for_each(|key| claims.release(key));
        }
    }

    /// Counts what is there. Reads the head of every record.
    pub fn stats(&mut self) -> Result<RowStats> {
        let mut stats = RowStats::default();
        for (_, chosen) in self.chosen()? {
            match chosen.kind {
                Kind::Result => {
                    stats.results += 1;
                    stats.payload += chosen.length as u64;
                }
                _ => stats.failures += 1,
            }
        }
        let (segments, bytes) = self.view.size();
        (stats.segments, stats.bytes) = (segments as u64, bytes);
        Ok(stats)
    }

    /// Keys of all rows with a result, or of all that failed, sorted.
    pub fn keys(&mut self, failed: bool) -> Result<Vec<Digest>> {
        let chosen = self.chosen()?;
        let mut keys: Vec<Digest> =
            chosen.into_iter().filter(|(_, c)| (c.kind == Kind::Failure) == failed).map(|(key, _)| key).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// What is kept of a row: its result, else its last failure.
    pub fn entry(&mut self, key: &Digest) -> Result<Option<Entry>> {
        for _ in 0..LOOKS {
            if let Some(result) = self.look_up(&[*key])?.pop().flatten() {
                return Ok(Some(Entry::Result(result)));
            }
            let Some(chosen) = self.chosen()?.remove(key).filter(|c| c.kind == Kind::Failure) else { return Ok(None) };
            if let Some((file, path)) = self.segment_file(chosen.segment)? {
                let message = payload_in(&file, &path, &chosen)?;
                return Ok(message.map(|bytes| Entry::Failure(String::from_utf8_lossy(&bytes).into_owned())));
            }
        }
        Err(self.restless())
    }

    /// Reads every record; returns how many there are, and how many places are damaged.
    pub fn verify(&mut self) -> Result<(u64, u64)> {
        let (places, mut damaged) = self.gather(|places: &mut Vec<Chosen>, _, place| places.push(place))?;
        // Segment by segment, as they lie.
        for segment in places.chunk_by(|a, b| a.segment == b.segment) {
            let Some(first) = segment.first() else { continue };
            // One that is gone was compacted meanwhile, by somebody who read all of it.
            let Some((file, path)) = self.segment_file(first.segment)? else { continue };
            for place in segment {
                damaged += u64::from(payload_in(&file, &path, place)?.is_none());
            }
        }
        Ok((places.len() as u64, damaged))
    }

    /// What `add` makes of every record, segment by segment, and in how many segments bytes were passed over because they
    /// are no record. It begins anew when a compaction moves them meanwhile.
    fn gather<T: Default>(&mut self, add: impl Fn(&mut T, Digest, Chosen)) -> Result<(T, u64)> {
        for _ in 0..LOOKS {
            self.view.refresh()?;
            let mut all = T::default();
            let see = |segment, place, header: record::Header| {
                add(&mut all, header.key, Chosen { kind: header.kind, segment, place, length: header.length });
            };
            if let Ok(broken) = self.view.headers(see)? {
                return Ok((all, broken));
            }
        }
        Err(self.restless())
    }

    /// For each distinct row the record that counts: its last result, else its last failure.
    fn chosen(&mut self) -> Result<FxHashMap<Digest, Chosen>> {
        let choose = |chosen: &mut FxHashMap<Digest, Chosen>, key, this: Chosen| {
            let slot = chosen.entry(key).or_insert(this);
            if this.kind == Kind::Result || slot.kind == Kind::Failure {
                *slot = this;
            }
        };
        Ok(self.gather(choose)?.0)
    }

    /// A segment of the view and where it is; `None` if it is gone.
    fn segment_file(&self, segment: usize) -> Result<Option<(fs::File, PathBuf)>> {
        let Some(path) = self.view.path(segment) else { return Ok(None) };
        Ok(view::open(&path)?.map(|file| (file, path)))
    }

    /// Removes every segment that nobody writes, and the index; returns whether that was all.
    pub(super) fn remove_all(&mut self) -> Result<bool> {
        if self.access == Access::Read {
            return Err(StoreError::OpenedForReading { root: self.folder.clone() });
        }
        let no_locks = || StoreError::NoLocks { path: self.folder.clone() };
        let _lock = loop {
            match compact::lock(&self.folder)? {
                Taking::Taken(lock) => break lock,
                Taking::Others => std::thread::sleep(LOOK),
                Taking::Gone if !self.folder.exists() => return Ok(true),
                Taking::Gone => {}
                Taking::Unknown => return Err(no_locks()),
            }
        };
        let mut all = true;
        for (id, _) in segment::list(&self.folder)? {
            match segment::lock_closed(&self.folder, &id)? {
                Taking::Taken(_lock) => {
                    let path = id.path(&self.folder);
                    fs::remove_file(&path).map_err(StoreError::while_doing("remove", &path))?;
                }
                Taking::Others => all = false,
                Taking::Gone => {}
                Taking::Unknown => return Err(no_locks()),
            }
        }
        self.view.forget_index();
        // Who has claimed rows will write them.
        all = all && Claims::open(&self.folder)?.remove();
        if all {
            let _ = fs::remove_file(self.folder.join(compact::LOCK));
            // Another may have begun a segment in it.
            let _ = fs::remove_dir(&self.folder);
        }
        Ok(all)
    }
}

/// A record's payload; `None` if it is damaged.
fn payload_in(file: &fs::File, path: &Path, chosen: &Chosen) -> Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; record::RECORD_HEADER + chosen.length];
    file.read_exact_at(&mut bytes, chosen.place).map_err(StoreError::while_doing("read", path))?;
    Ok(record::header(&bytes).and_then(|header| Some(record::payload(&bytes, &header)?.to_vec())))
}

/// A row to append.
#[derive(Clone, Copy, Debug)]
pub enum RowRef<'a> {
    Result(&'a [u8]),
    Failure(&'a str),
}

/// Where a row's record is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    pub kind: Kind,
    pub segment: usize,
    pub place: u64,
    pub length: usize,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.writer.is_some() {
            self.view.write_index(false);
        }
    }
}
