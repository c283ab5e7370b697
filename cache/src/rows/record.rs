//! The bytes of a segment: a header, then records, each with its own check.
//!
//! ```text
//! segment  "grlmrows" version:u32 0:u32  record*
//! record   check:8  'g' 'r' '*' kind:u8  length:u32  key:32  payload:length
//! ```
//!
//! The check is the first 8 bytes of the BLAKE3 hash of all that follows it in the record, so nothing damaged is taken
//! for a result. After damage [`scan`] goes on at the next record that is whole; a torn tail is left out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::digest::Digest;

pub(crate) const SEGMENT_HEADER: &[u8; 16] = b"grlmrows\x01\0\0\0\0\0\0\0";
pub(crate) const RECORD_HEADER: usize = 48;
/// Longer results belong into a file.
pub(crate) const LONGEST_PAYLOAD: usize = 1 << 30;
const MAGIC: [u8; 3] = *b"gr*";
/// Read at a time by [`scan`].
const WINDOW: usize = 1 << 20;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A row's result.
    Result,
    /// Why a row has no result, in words.
    Failure,
    /// In an export: the namespace of the records that follow.
    Namespace,
    /// In an export: its end, with the number of records before it.
    End,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Result => 1,
            Kind::Failure => 2,
            Kind::Namespace => 3,
            Kind::End => 4,
        }
    }

    fn of(code: u8) -> Option<Kind> {
        [Kind::Result, Kind::Failure, Kind::Namespace, Kind::End].into_iter().find(|kind| kind.code() == code)
    }
}

/// A record's header, as it says; whether it is true only [`is_whole`] knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub key: Digest,
    pub length: usize,
}

impl Header {
    /// Bytes of the whole record.
    pub fn record_bytes(&self) -> usize {
        RECORD_HEADER + self.length
    }
}

/// Appends a record to `out`. The payload must not be longer than [`LONGEST_PAYLOAD`].
pub(crate) fn encode(kind: Kind, key: &Digest, payload: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&MAGIC);
    out.push(kind.code());
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(payload);
    let check = check_of(&out[start + 8..]);
    out[start..start + 8].copy_from_slice(&check);
}

/// The header at the start of `bytes`, if it looks like one.
pub(crate) fn header(bytes: &[u8]) -> Option<Header> {
    let (head, _) = bytes.split_first_chunk::<RECORD_HEADER>()?;
    let (_, rest) = head.split_first_chunk::<8>()?;
    let (magic, rest) = rest.split_first_chunk::<3>()?;
    let (&[kind], rest) = rest.split_first_chunk::<1>()?;
    let (length, key) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if *magic != MAGIC || length > LONGEST_PAYLOAD {
        return None;
    }
    Some(Header { kind: Kind::of(kind)?, key: Digest::from_bytes(key.try_into().ok()?), length })
}

/// The payload of the record that `bytes` starts with; `None` unless it is there in full and true.
pub(crate) fn payload<'a>(bytes: &'a [u8], header: &Header) -> Option<&'a [u8]> {
    let record = bytes.get(..header.record_bytes())?;
    (check_of(&record[8..]) == record[..8]).then(|| &record[RECORD_HEADER..])
}

fn check_of(bytes: &[u8]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    check
}

/// Walks over the records between `from` and the end of a segment, calling `see` with the place of each. Payloads are
/// not read, so a record seen here may still turn out damaged. Returns the place up to which all is accounted for,
/// where a later scan goes on, and the bytes that were passed over because they are no record.
pub(crate) fn scan(file: &File, from: u64, mut see: impl FnMut(u64, Header)) -> io::Result<Scanned> {
    let end = file.metadata()?.len();
    let mut window = Window::default();
    let mut place = from;
    let mut before = None;
    let mut passed_over = 0;
    if place == 0 {
        let start = window.get(file, 0, SEGMENT_HEADER.len(), end)?;
        if start.len() < SEGMENT_HEADER.len() {
            return Ok(Scanned { covered: 0, passed_over: 0 });
        }
        // A damaged header costs nothing: records stand for themselves.
        place = SEGMENT_HEADER.len() as u64;
    }
    while place < end {
        let found = header(window.get(file, place, RECORD_HEADER, end)?);
        match found.filter(|header| place + header.record_bytes() as u64 <= end) {
            Some(header) => {
                see(place, header);
                before = Some(place);
                place += header.record_bytes() as u64;
            }
            // It may be the length of the record before that is wrong, and have led past the next one.
            None => match next_whole(file, before.unwrap_or(place) + 1, end)? {
                Some(next) => {
                    passed_over += next.saturating_sub(place).max(1);
                    place = next;
                }
                None => break,
            },
        }
    }
    Ok(Scanned { covered: place, passed_over })
}

/// What a [`scan`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scanned {
    pub covered: u64,
    pub passed_over: u64,
}

/// The place of the first record from `from` on that is whole, its payload included.
fn next_whole(file: &File, from: u64, end: u64) -> io::Result<Option<u64>> {
    let mut place = from;
    let mut window = Window::default();
    while place + (RECORD_HEADER as u64) <= end {
        let bytes = window.get(file, place, RECORD_HEADER, end)?;
        // The magic stands 8 bytes into a record.
        let Some(at) = bytes.windows(3).skip(8).position(|three| three == MAGIC) else {
            place += (bytes.len() as u64).saturating_sub(RECORD_HEADER as u64).max(1);
            continue;
        };
        place += at as u64;
        let found = header(window.get(file, place, RECORD_HEADER, end)?);
        if let Some(header) = found.filter(|header| place + header.record_bytes() as u64 <= end) {
            let mut record = vec![0; header.record_bytes()];
            file.read_exact_at(&mut record, place)?;
            if payload(&record, &header).is_some() {
                return Ok(Some(place));
            }
        }
        place += 1;
    }
    Ok(None)
}

/// A part of a file in memory.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// What is in the file from `place` on: at least `wanted` bytes, unless it ends before.
    fn get(&mut self, file: &File, place: u64, wanted: usize, end: u64) -> io::Result<&[u8]> {
        let held = self.start..self.start + self.bytes.len() as u64;
        let enough = (place + wanted as u64).min(end);
        if !(held.start <= place && enough <= held.end) {
            let size = usize::try_from(end.saturating_sub(place)).unwrap_or(WINDOW).min(WINDOW);
            self.bytes.resize(size, 0);
            file.read_exact_at(&mut self.bytes, place)?;
            self.start = place;
        }
        Ok(&self.bytes[(place - self.start) as usize..])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn key(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn segment(payloads: &[&[u8]]) -> (Vec<u8>, Vec<u64>) {
        let mut bytes = SEGMENT_HEADER.to_vec();
        let mut places = Vec::new();
        for (n, payload) in payloads.iter().enumerate() {
            places.push(bytes.len() as u64);
            encode(Kind::Result, &key(n as u8), payload, &mut bytes);
        }
        (bytes, places)
    }

    fn seen(bytes: &[u8], from: u64) -> (Vec<u64>, Scanned) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut places = Vec::new();
        let scanned = scan(&file, from, |place, _| places.push(place)).unwrap();
        (places, scanned)
    }

    #[test]
    fn a_record_comes_back_and_any_flipped_bit_is_seen() {
        let (bytes, places) = segment(&[b"result"]);
        let record = &bytes[places[0] as usize..];
        let whole = header(record).unwrap();
        assert_eq!((whole.kind, whole.key, whole.length), (Kind::Result, key(0), 6));
        assert_eq!(payload(record, &whole), Some(&b"result"[..]));
        for bit in 0..record.len() * 8 {
            let mut damaged = record.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let served = header(&damaged).and_then(|h| payload(&damaged, &h).map(<[u8]>::to_vec));
            assert_eq!(served, None, "bit {bit}");
        }
    }

    #[test]
    fn a_scan_ends_before_a_torn_tail_and_goes_on_there_later() {
        let (bytes, places) = segment(&[b"one", b"", &[7; 3000]]);
        for cut in 0..=bytes.len() {
            let (found, scanned) = seen(&bytes[..cut], 0);
            let ends = places[1..].iter().copied().chain([bytes.len() as u64]);
            let whole = places.iter().zip(ends).filter(|(_, end)| *end <= cut as u64);
            let expected: Vec<u64> = whole.map(|(place, _)| *place).collect();
            assert_eq!(found, expected, "cut at {cut}");
            assert_eq!(scanned.passed_over, 0);
            let (rest, _) = seen(&bytes, scanned.covered);
            assert_eq!([found, rest].concat(), places, "cut at {cut}");
        }
    }

    #[test]
    fn after_damage_the_next_whole_record_is_found() {
        let long = vec![b'g'; 2 * WINDOW];
        let (bytes, places) = segment(&[b"one", &long, b"three"]);
        let mut damaged = bytes.clone();
        // The length of the second: framing is lost.
        damaged[places[1] as usize + 13] ^= 0x55;
        let (found, scanned) = seen(&damaged, 0);
        assert_eq!(found, [places[0], places[2]]);
        assert_eq!(scanned, Scanned { covered: bytes.len() as u64, passed_over: places[2] - places[1] });
        let mut zeroed = bytes.clone();
        zeroed[places[0] as usize..places[1] as usize].fill(0);
        assert_eq!(seen(&zeroed, 0).0, places[1..]);
    }
}
