//! Where each row is: a table over all segments of a namespace, sorted by key, in one file on this host, and beside it
//! in memory what was appended since the file was written.
//!
//! It is never the truth: a record is believed by its own key and check. The file can be deleted at any time, is read
//! whole with a check of its own, and is replaced by a rename, so any number of processes use it without a lock. An
//! embedded database would hold every key twice and admits one process; `scripts/bench rowstore` compares with one.

use std::fs;
use std::io::Write;
use std::path::Path;

use rustc_hash::FxHashMap;

use crate::digest::Digest;
use crate::rows::segment::SegmentId;
use crate::store::temporary_in;

const MAGIC: &[u8; 8] = b"grlmridx";
const VERSION: u32 = 1;
const CHECK: usize = 32;
const OFFSET_BITS: u32 = 44;

/// A record's segment (its position in the view's list) and its place in the file. Ordered as the bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u64);

impl Place {
    /// `None` beyond a million segments or 16 TiB in one of them.
    pub fn new(segment: usize, offset: u64) -> Option<Place> {
        let fits = offset < 1 << OFFSET_BITS && segment < 1 << (64 - OFFSET_BITS);
        fits.then_some(Place((segment as u64) << OFFSET_BITS | offset))
    }

    pub fn segment(self) -> usize {
        (self.0 >> OFFSET_BITS) as usize
    }

    pub fn offset(self) -> u64 {
        self.0 & ((1 << OFFSET_BITS) - 1)
    }
}

/// A segment, and how far the index covers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Covered {
    pub id: SegmentId,
    pub bytes: u64,
}

/// The first bytes of a key, by which the table is sorted. Keys are hashes, so these are evenly spread.
fn prefix(key: &Digest) -> u64 {
    key.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Key → places where a record of that key may be.
#[derive(Debug, Default)]
pub(crate) struct Index {
    table: Vec<(u64, Place)>,
    tail: FxHashMap<u64, Place>,
    /// Further places of the same prefix: a row computed twice, mostly.
    more: FxHashMap<u64, Vec<Place>>,
}

impl Index {
    pub fn insert(&mut self, key: &Digest, place: Place) {
        let prefix = prefix(key);
        match self.tail.entry(prefix) {
            std::collections::hash_map::Entry::Vacant(slot) => {
                slot.insert(place);
            }
            std::collections::hash_map::Entry::Occupied(_) => self.more.entry(prefix).or_default().push(place),
        }
    }

    /// The candidates for a key. Those of other keys with the same first bytes are among them.
    pub fn candidates(&self, key: &Digest) -> impl Iterator<Item = Place> {
        let prefix = prefix(key);
        let first = self.first_at_least(prefix);
        let sorted = self.table[first..].iter().take_while(move |(p, _)| *p == prefix).map(|(_, place)| *place);
        let recent = self.tail.get(&prefix).into_iter().chain(self.more.get(&prefix).into_iter().flatten()).copied();
        sorted.chain(recent)
    }

    /// Entries of the file, and entries that are only in memory.
    pub fn sizes(&self) -> (usize, usize) {
        (self.table.len(), self.tail.len() + self.more.values().map(Vec::len).sum::<usize>())
    }

    /// The position of the first entry whose prefix is not smaller. Starts where it would be if keys were spread
    /// perfectly, which is off by the root of the table's length, and gallops from there.
    fn first_at_least(&self, prefix: u64) -> usize {
        let n = self.table.len();
        let guess = ((u128::from(prefix) * n as u128) >> 64) as usize;
        let (mut low, mut high);
        let mut step = 16;
        if guess < n && self.table[guess].0 < prefix {
            low = guess + 1;
            high = (low + step).min(n);
            while high < n && self.table[high - 1].0 < prefix {
                (low, step) = (high, step * 2);
                high = (high + step).min(n);
            }
        } else {
            high = guess.min(n);
            low = high.saturating_sub(step);
            while low > 0 && self.table[low].0 >= prefix {
                (high, step) = (low, step * 2);
                low = low.saturating_sub(step);
            }
        }
        low + self.table[low..high].partition_point(|(p, _)| *p < prefix)
    }

    /// Moves what is only in memory into the table.
    pub fn settle(&mut self) {
        let tail = std::mem::take(&mut self.tail);
        let more = std::mem::take(&mut self.more);
        self.table.extend(tail);
        self.table.extend(more.into_iter().flat_map(|(prefix, places)| places.into_iter().map(move |p| (prefix, p))));
        self.table.sort_unstable();
        self.table.dedup();
    }

    /// Writes the table, which must have been settled, for the segments that its places count.
    pub fn write(&self, path: &Path, segments: &[Covered]) -> std::io::Result<()> {
        let mut bytes = Vec::with_capacity(64 + segments.len() * 64 + self.table.len() * 16);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(segments.len() as u32).to_le_bytes());
        for segment in segments {
            bytes.extend_from_slice(&(segment.id.0.len() as u32).to_le_bytes());
            bytes.extend_from_slice(segment.id.0.as_bytes());
            bytes.extend_from_slice(&segment.bytes.to_le_bytes());
        }
        bytes.extend_from_slice(&(self.table.len() as u64).to_le_bytes());
        for (prefix, place) in &self.table {
            bytes.extend_from_slice(&prefix.to_le_bytes());
            bytes.extend_from_slice(&place.0.to_le_bytes());
        }
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        let folder = path.parent().unwrap_or(Path::new("."));
        let mut staged = temporary_in(folder).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => fs::create_dir_all(folder).and_then(|()| temporary_in(folder)),
            _ => Err(error),
        })?;
        staged.write_all(&bytes)?;
        staged.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// Reads what [`Index::write`] wrote; `None` if it is missing, damaged or of another version.
    pub fn read(path: &Path) -> Option<(Index, Vec<Covered>)> {
        let bytes = fs::read(path).ok()?;
        let (content, check) = bytes.split_at_checked(bytes.len().checked_sub(CHECK)?)?;
        if blake3::Hasher::new().update_rayon(content).finalize().as_bytes() != check {
            return None;
        }
        let mut reader = Reader(content);
        if reader.take(8)? != MAGIC || reader.u32()? != VERSION {
            return None;
        }
        let segments = (0..reader.u32()?)
            .map(|_| {
                let length = reader.u32()? as usize;
                let id = SegmentId(String::from_utf8(reader.take(length)?.to_vec()).ok()?);
                Some(Covered { id, bytes: reader.u64()? })
            })
            .collect::<Option<Vec<_>>>()?;
        let entries = usize::try_from(reader.u64()?).ok()?;
        let (pairs, []) = reader.take(entries.checked_mul(16)?)?.as_chunks::<16>() else { return None };
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let table = pairs.iter().map(|pair| (number(&pair[..8]), Place(number(&pair[8..])))).collect();
        Some((Index { table, ..Index::default() }, segments))
    }

    /// Renumbers the segments, and forgets the entries of those that map to nothing.
    pub fn renumber(&mut self, number: impl Fn(usize) -> Option<usize>) {
        self.settle();
        self.table.retain_mut(|(_, place)| match number(place.segment()).and_then(|n| Place::new(n, place.offset())) {
            Some(moved) => {
                *place = moved;
                true
            }
            None => false,
        });
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn place(n: u64) -> Place {
        Place::new((n % 7) as usize, n * 100).unwrap()
    }

    fn filled(range: std::ops::Range<u64>) -> Index {
        let mut index = Index::default();
        range.for_each(|n| index.insert(&key(n), place(n)));
        index
    }

    #[test]
    fn every_key_is_found_in_the_table_and_in_memory_and_no_other() {
        for n in [0, 1, 2, 17, 5000] {
            let mut index = filled(0..n);
            index.settle();
            (n..n + 50).for_each(|n| index.insert(&key(n), place(n)));
            for n in 0..n + 50 {
                assert_eq!(index.candidates(&key(n)).collect::<Vec<_>>(), [place(n)], "{n}");
            }
            assert!((n + 50..n + 500).all(|n| index.candidates(&key(n)).next().is_none()));
        }
    }

    #[test]
    fn unevenly_spread_keys_are_found_too() {
        let mut index = Index::default();
        let keys: Vec<Digest> = (0..2000u64)
            .map(|n| {
                let mut bytes = [0; 32];
                bytes[..8].copy_from_slice(&(u64::MAX - n * n).to_be_bytes());
                bytes[31] = 1;
                Digest::from_bytes(bytes)
            })
            .collect();
        keys.iter().zip(0..).for_each(|(key, n)| index.insert(key, place(n)));
        index.settle();
        for (key, n) in keys.iter().zip(0..) {
            assert_eq!(index.candidates(key).collect::<Vec<_>>(), [place(n)]);
        }
        assert!(index.candidates(&Digest::from_bytes([0; 32])).next().is_none());
        assert!(index.candidates(&Digest::from_bytes([255; 32])).next().is_some(), "its first bytes are the same");
    }

    #[test]
    fn a_key_may_have_several_places() {
        let mut index = filled(0..1);
        index.insert(&key(0), place(3));
        index.insert(&key(0), place(4));
        index.settle();
        index.insert(&key(0), place(5));
        let mut places: Vec<Place> = index.candidates(&key(0)).collect();
        places.sort_unstable();
        assert_eq!(places, [place(0), place(3), place(4), place(5)]);
    }

    #[test]
    fn the_file_comes_back_unless_it_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host/rows/embedding.idx");
        let mut index = filled(0..100);
        index.settle();
        let segments = vec![Covered { id: SegmentId("a".into()), bytes: 7 }];
        index.write(&path, &segments).unwrap();
        let (read, covered) = Index::read(&path).unwrap();
        assert_eq!((read.table, covered), (index.table, segments));
        let bytes = fs::read(&path).unwrap();
        for damage in [0, 9, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[damage] ^= 4;
            fs::write(&path, &damaged).unwrap();
            assert!(Index::read(&path).is_none(), "byte {damage}");
        }
        fs::write(&path, &bytes[..20]).unwrap();
        assert!(Index::read(&path).is_none());
    }

    #[test]
    fn entries_of_segments_that_are_gone_are_forgotten() {
        let mut index = filled(0..70);
        index.renumber(|segment| (segment != 3).then_some(segment % 2));
        assert_eq!(index.sizes().0, 60);
        assert!(index.candidates(&key(3)).next().is_none());
        assert_eq!(index.candidates(&key(5)).collect::<Vec<_>>(), [Place::new(1, 500).unwrap()]);
    }
}
