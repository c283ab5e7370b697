//! What a process sees of a namespace: its segments as they were when it last looked, and the index over them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustc_hash::FxHashMap;

use crate::digest::Digest;
use crate::rows::compact::compactions;
use crate::rows::index::{Covered, Index, Place};
use crate::rows::record::{self, Kind, RECORD_HEADER};
use crate::rows::segment::{self, SegmentId, is_gone};
use crate::{Result, StoreError};

/// Records that lie closer than this are read in one go.
const GAP: u64 = 32 << 10;
/// Read in one go at most, but for a single record that is longer.
const GO: u64 = 1 << 20;
/// Read of the last record of a go before its length is known.
const PEEK: u64 = 4 << 10;
/// How long a segment that is listed and not there is taken for one that was just compacted.
const PATIENCE: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(10);
/// So many new entries are worth an index file, and a quarter of it is worth a new one.
const WORTH_WRITING: usize = 4096;

#[derive(Debug)]
pub(crate) struct View {
    folder: PathBuf,
    index_path: PathBuf,
    segments: Vec<Known>,
    by_id: FxHashMap<SegmentId, usize>,
    index: Index,
}

#[derive(Debug)]
struct Known {
    id: SegmentId,
    /// Up to here its records are in the index.
    covered: u64,
    /// How long it was when it was last scanned.
    size: u64,
    file: Option<File>,
}

/// A segment of the view is no longer there: it was compacted.
#[derive(Debug)]
pub(crate) struct Vanished;

impl View {
    /// Looks at a namespace for the first time: reads the index and scans what it does not cover.
    pub fn open(folder: &Path, index_path: &Path) -> Result<View> {
        let mut view = View {
            folder: folder.to_owned(),
            index_path: index_path.to_owned(),
            segments: Vec::new(),
            by_id: FxHashMap::default(),
            index: Index::default(),
        };
        view.reload()?;
        Ok(view)
    }

    /// Forgets what was known of the segments and of their rows but for what the index says of those that are there.
    fn begin_anew(&mut self, there: &[(SegmentId, u64)]) {
        self.segments.clear();
        self.by_id.clear();
        let there: FxHashMap<&SegmentId, u64> = there.iter().map(|(id, size)| (id, *size)).collect();
        self.index = match Index::read(&self.index_path) {
            None => Index::default(),
            Some((mut index, covered)) => {
                // A segment that is shorter than it was lost records: what the index says of it is worth nothing.
                let alive = |c: &Covered| there.get(&c.id).is_some_and(|size| *size >= c.bytes);
                let numbers: Vec<Option<usize>> =
                    covered.into_iter().map(|c| alive(&c).then(|| self.add(c.id, c.bytes))).collect();
                if numbers.iter().any(Option::is_none) {
                    index.renumber(|segment| numbers.get(segment).copied().flatten());
                }
                index
            }
        };
    }

    fn add(&mut self, id: SegmentId, covered: u64) -> usize {
        let number = self.segments.len();
        self.by_id.insert(id.clone(), number);
        self.segments.push(Known { id, covered, size: covered, file: None });
        number
    }

    /// Takes in what was appended since, by anyone. Returns whether there was anything.
    pub fn refresh(&mut self) -> Result<bool> {
        self.look(false, segment::list)
    }

    /// Looks at everything anew.
    pub fn reload(&mut self) -> Result<()> {
        self.look(true, segment::list).map(|_| ())
    }

    /// Looks until no compaction came in between: while a folder is read, one may place a segment that the list does
    /// not have yet, and remove those that it took the rows from before they are opened.
    fn look(&mut self, mut anew: bool, mut list: impl FnMut(&Path) -> Result<Vec<(SegmentId, u64)>>) -> Result<bool> {
        let mut news = anew;
        let mut patience = PATIENCE;
        loop {
            let before = compactions(&self.folder)?;
            let there = list(&self.folder)?;
            let gone = |known: &Known| there.binary_search_by(|(id, _)| id.cmp(&known.id)).is_err();
            if anew || self.segments.iter().any(gone) {
                self.begin_anew(&there);
                news = true;
            }
            let mut all_there = true;
            for (id, size) in there {
                let number = match self.by_id.get(&id) {
                    Some(number) => *number,
                    None => self.add(id, 0),
                };
                if self.segments[number].size != size {
                    news = true;
                    all_there &= self.scan(number, size)?;
                }
            }
            anew = false;
            if compactions(&self.folder)? != before {
                continue;
            }
            if all_there || patience.is_zero() {
                return Ok(news);
            }
            // The list of a network disk may be older than what it lists.
            std::thread::sleep(PAUSE);
            patience = patience.saturating_sub(PAUSE);
        }
    }

    /// Takes in what is new in a segment; whether it was still there.
    fn scan(&mut self, number: usize, size: u64) -> Result<bool> {
        let index = &mut self.index;
        let known = &mut self.segments[number];
        let path = known.id.path(&self.folder);
        let Some(file) = opened(&mut known.file, &path)? else { return Ok(false) };
        let see = |offset, header: record::Header| {
            if header.kind == Kind::Result
                && let Some(place) = Place::new(number, offset)
            {
                index.insert(&header.key, place);
            }
        };
        let Some(scanned) = unless_gone("read", &path, record::scan(file, known.covered, see))? else {
            return Ok(false);
        };
        if scanned.passed_over > 0 {
            tracing::warn!(path = %path.display(), bytes = scanned.passed_over, "a part of a segment is damaged");
        }
        known.covered = scanned.covered;
        known.size = size;
        Ok(true)
    }

    /// Takes note of records that this process appended to a segment of its own, now `length` bytes long.
    pub fn appended(&mut self, id: &SegmentId, places: impl Iterator<Item = (Digest, u64)>, length: u64) {
        let number = match self.by_id.get(id) {
            Some(number) => *number,
            None => self.add(id.clone(), 0),
        };
        for (key, offset) in places {
            if let Some(place) = Place::new(number, offset) {
                self.index.insert(&key, place);
            }
        }
        let known = &mut self.segments[number];
        (known.covered, known.size) = (length, length);
    }

    /// The results that are there and whole, in the order of `keys`.
    pub fn read(&mut self, keys: &[Digest]) -> Result<std::result::Result<Vec<Option<Vec<u8>>>, Vanished>> {
        let mut results: Vec<Option<Vec<u8>>> = vec![None; keys.len()];
        let mut pending: Vec<u32> = (0..keys.len() as u32).collect();
        // Mostly one round: a second one is for rows whose first candidate was damaged, or another row's.
        for round in 0.. {
            let mut wanted: Vec<(Place, u32)> = pending
                .iter()
                .filter_map(|&n| Some((self.index.candidates(&keys[n as usize]).nth(round)?, n)))
                .collect();
            if wanted.is_empty() {
                break;
            }
            wanted.sort_unstable();
            let mut rest = wanted.as_slice();
            let mut buffer = Vec::new();
            while !rest.is_empty() {
                let (go, left) = rest.split_at(length_of_go(rest));
                rest = left;
                if self.read_go(go, keys, &mut results, &mut buffer)?.is_err() {
                    return Ok(Err(Vanished));
                }
            }
            pending = wanted.into_iter().map(|(_, n)| n).filter(|&n| results[n as usize].is_none()).collect();
        }
        Ok(Ok(results))
    }

    /// Reads records that lie close together in one segment.
    fn read_go(
        &mut self,
        go: &[(Place, u32)],
        keys: &[Digest],
        results: &mut [Option<Vec<u8>>],
        buffer: &mut Vec<u8>,
    ) -> Result<std::result::Result<(), Vanished>> {
        let (Some((first, _)), Some((last, _))) = (go.first(), go.last()) else { return Ok(Ok(())) };
        let known = &mut self.segments[first.segment()];
        let path = known.id.path(&self.folder);
        let Some(file) = opened(&mut known.file, &path)? else { return Ok(Err(Vanished)) };
        let start = first.offset();
        buffer.resize((last.offset() - start + PEEK) as usize, 0);
        let Some(filled) = unless_gone("read", &path, read_up_to(file, buffer, start))? else {
            return Ok(Err(Vanished));
        };
        for (place, n) in go {
            let bytes = buffer[..filled].get((place.offset() - start) as usize..).unwrap_or_default();
            let key = &keys[*n as usize];
            let Some(header) = record::header(bytes).filter(|h| h.kind == Kind::Result && h.key == *key) else {
                continue;
            };
            let payload = if bytes.len() >= header.record_bytes() {
                record::payload(bytes, &header).map(<[u8]>::to_vec)
            } else {
                let mut long = vec![0; header.record_bytes()];
                let filled = read_up_to(file, &mut long, place.offset());
                let Some(filled) = unless_gone("read", &path, filled)? else { return Ok(Err(Vanished)) };
                record::payload(&long[..filled], &header).map(<[u8]>::len).map(|_| long.split_off(RECORD_HEADER))
            };
            if payload.is_none() {
                tracing::warn!(path = %path.display(), offset = place.offset(), "a row is damaged, and computed again");
            }
            results[*n as usize] = payload;
        }
        Ok(Ok(()))
    }

    /// Writes the index, if enough is new since it was written. A failure is no error: it is built again.
    pub fn write_index(&mut self, anyway: bool) {
        let (table, new) = self.index.sizes();
        if new == 0 || (!anyway && (new < WORTH_WRITING || new * 4 < table)) {
            return;
        }
        self.index.settle();
        let covered: Vec<Covered> =
            self.segments.iter().map(|known| Covered { id: known.id.clone(), bytes: known.covered }).collect();
        if let Err(error) = self.index.write(&self.index_path, &covered) {
            tracing::warn!(path = %self.index_path.display(), %error, "cannot write the index of rows");
        }
    }

    /// Brings the segments to the disk that were written to a short time ago.
    pub fn sync_recent(&self) -> Result<()> {
        let mut any = false;
        for known in &self.segments {
            any |= segment::sync_if_recent(&known.id.path(&self.folder))?;
        }
        if any { crate::sync::sync_path(&self.folder) } else { Ok(()) }
    }

    /// Removes the index; the next look at the namespace builds it again.
    pub fn forget_index(&mut self) {
        let _ = std::fs::remove_file(&self.index_path);
    }

    /// Calls `see` for every record, segment by segment. Payloads are not looked at. Returns in how many segments bytes
    /// were passed over because they are no record.
    pub fn headers(
        &self,
        mut see: impl FnMut(usize, u64, record::Header),
    ) -> Result<std::result::Result<u64, Vanished>> {
        let mut broken = 0;
        for (number, known) in self.segments.iter().enumerate() {
            let path = known.id.path(&self.folder);
            let Some(file) = open(&path)? else { return Ok(Err(Vanished)) };
            let scanned = record::scan(&file, 0, |place, header| see(number, place, header));
            let Some(scanned) = unless_gone("read", &path, scanned)? else { return Ok(Err(Vanished)) };
            broken += u64::from(scanned.passed_over > 0);
        }
        Ok(Ok(broken))
    }

    /// Names and files of the segments, as [`View::headers`] counts them.
    pub fn path(&self, segment: usize) -> Option<PathBuf> {
        Some(self.segments.get(segment)?.id.path(&self.folder))
    }

    /// Segments, and their bytes.
    pub fn size(&self) -> (usize, u64) {
        (self.segments.len(), self.segments.iter().map(|known| known.size).sum())
    }
}

/// How many of `rest`, from its first on, are read in one go.
fn length_of_go(rest: &[(Place, u32)]) -> usize {
    let Some((first, _)) = rest.first() else { return 0 };
    let near = |pair: &&[(Place, u32)]| {
        let [(before, _), (place, _)] = pair else { return false };
        place.segment() == first.segment()
            && place.offset() - before.offset() <= GAP
            && place.offset() - first.offset() <= GO
    };
    1 + rest.windows(2).take_while(near).count()
}

/// The segment's file, opened on first use; `None` if it is gone.
fn opened<'a>(slot: &'a mut Option<File>, path: &Path) -> Result<Option<&'a File>> {
    if slot.is_none() {
        *slot = open(path)?;
    }
    Ok(slot.as_ref())
}

/// A segment's file; `None` if it is gone.
pub(super) fn open(path: &Path) -> Result<Option<File>> {
    unless_gone("open", path, File::open(path))
}

/// What came of doing something with a segment; `None` if it is gone.
fn unless_gone<T>(action: &'static str, path: &Path, done: io::Result<T>) -> Result<Option<T>> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(StoreError::io(action, path, error)),
    }
}

/// Fills as much of `buffer` as the file has from `place` on.
fn read_up_to(file: &File, buffer: &mut [u8], place: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], place + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Access;
    use crate::rows::{RowRef, RowStore};

    #[test]
    fn rows_that_a_compaction_moves_during_a_look_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = RowStore::at(&dir.path().join("rows"), Access::Write);
        let folder = store.folder().join("n");
        let key = |n: u8| Digest::of(&[n]);
        let mut view = View::open(&folder, &dir.path().join("unused.idx")).unwrap();
        for n in 0..3 {
            store.namespace("n").unwrap().append([(key(n), RowRef::Result(&[n]))]).unwrap();
            // Rows of a segment that is in the list and gone when it would be opened; then, in a second look, of one
            // that came and went while the folder was read.
            let mut looks = 0;
            let list = |folder: &Path| {
                looks += 1;
                let before = segment::list(folder)?;
                if looks <= 2 {
                    assert!(store.namespace("n")?.compact()? > 0);
                }
                Ok(if looks == 2 { before.into_iter().filter(|(_, size)| *size == 0).collect() } else { before })
            };
            assert!(view.look(n == 1, list).unwrap());
            assert_eq!(looks, 3);
            let keys: Vec<Digest> = (0..=n).map(key).collect();
            let expected: Vec<Option<Vec<u8>>> = (0..=n).map(|n| Some(vec![n])).collect();
            assert_eq!(view.read(&keys).unwrap().unwrap(), expected);
        }
    }
}
