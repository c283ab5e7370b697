//! The stat signature of a file: what must be unchanged for its digest to be believed without reading it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Device, inode, size and both times of a file, in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub mtime: i64,
    pub ctime: i64,
}

pub(crate) const SIGNATURE_BYTES: usize = 40;

/// Clocks of file systems tick every few milliseconds (Linux before 6.13: up to 10).
const FINE_TICK: i64 = 50_000_000;
/// Where both times are whole seconds, the file system most likely keeps no fractions; FAT keeps even seconds.
const COARSE_TICK: i64 = 2_000_000_000;
const SECOND: i64 = 1_000_000_000;

impl Signature {
    pub fn of(metadata: &Metadata) -> Signature {
        Signature {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: metadata.mtime().saturating_mul(SECOND).saturating_add(metadata.mtime_nsec()),
            ctime: metadata.ctime().saturating_mul(SECOND).saturating_add(metadata.ctime_nsec()),
        }
    }

    #[allow(clippy::unnecessary_cast, reason = "the fields' types differ between platforms")]
    pub fn of_stat(stat: &rustix::fs::Stat) -> Signature {
        Signature {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as u64,
            mtime: (stat.st_mtime as i64).saturating_mul(SECOND).saturating_add(stat.st_mtime_nsec as i64),
            ctime: (stat.st_ctime as i64).saturating_mul(SECOND).saturating_add(stat.st_ctime_nsec as i64),
        }
    }

    /// The same file with the same content, as far as its times can tell; linking, unlinking and renaming a file
    /// change its ctime and nothing else.
    pub fn same_but_ctime(&self, other: &Signature) -> bool {
        Signature { ctime: 0, ..*self } == Signature { ctime: 0, ..*other }
    }

    /// Whether the file may have been changed in the same clock tick in which its hashing began, so that a later
    /// edit in that tick would leave the signature as it is. `began` is [`now`] from before the first read.
    pub fn is_racy(&self, began: i64) -> bool {
        self.mtime.max(self.ctime).saturating_add(self.tick()) >= began
    }

    /// The same for a blob. Only its mtime tells edits, as it was dated back when it was sealed, and links change its
    /// ctime all the time. That date is a whole second on every disk: how fine the clock is shows in the ctime.
    pub fn is_racy_blob(&self, began: i64) -> bool {
        self.mtime.saturating_add(self.tick()) >= began
    }

    fn tick(&self) -> i64 {
        let coarse = self.mtime % SECOND == 0 && self.ctime % SECOND == 0;
        if coarse { COARSE_TICK } else { FINE_TICK }
    }

    pub fn to_bytes(self) -> [u8; SIGNATURE_BYTES] {
        let mut bytes = [0; SIGNATURE_BYTES];
        let fields = [self.device, self.inode, self.size, self.mtime.cast_unsigned(), self.ctime.cast_unsigned()];
        for (place, field) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            *place = field.to_le_bytes();
        }
        bytes
    }

    pub fn from_bytes(bytes: &[u8; SIGNATURE_BYTES]) -> Signature {
        let mut fields = [0; 5];
        for (field, place) in fields.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *field = u64::from_le_bytes(*place);
        }
        let [device, inode, size, mtime, ctime] = fields;
        Signature { device, inode, size, mtime: mtime.cast_signed(), ctime: ctime.cast_signed() }
    }
}

/// Nanoseconds since 1970 by this host's clock; a clock before 1970 gives 0, which makes everything look racy.
pub(crate) fn now() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Signature = Signature { device: 1, inode: 2, size: 3, mtime: 4_100_000_000, ctime: 5_100_000_000 };

    #[test]
    fn bytes_round_trip() {
        let signature = Signature { mtime: -1, ctime: i64::MAX, ..OLD };
        assert_eq!(Signature::from_bytes(&signature.to_bytes()), signature);
    }

    #[test]
    fn a_file_touched_just_before_hashing_is_racy() {
        assert!(OLD.is_racy(OLD.ctime));
        assert!(OLD.is_racy(OLD.ctime + 9_000_000));
        assert!(!OLD.is_racy(OLD.ctime + SECOND));
        let coarse = Signature { mtime: 4 * SECOND, ctime: 4 * SECOND, ..OLD };
        assert!(coarse.is_racy(5 * SECOND));
        assert!(!coarse.is_racy(7 * SECOND));
        assert!(OLD.is_racy(0), "a clock that went back trusts nothing");
    }

    #[test]
    fn a_blob_is_judged_by_its_date_and_the_clock_by_its_ctime() {
        let sealed = Signature { mtime: 4 * SECOND, ctime: 5_100_000_000, ..OLD };
        assert!(!sealed.is_racy_blob(sealed.ctime), "linked just now, edited long ago");
        assert!(sealed.is_racy_blob(sealed.mtime + 9_000_000), "edited just now");
        let coarse = Signature { ctime: 5 * SECOND, ..sealed };
        assert!(coarse.is_racy_blob(5 * SECOND) && !coarse.is_racy_blob(7 * SECOND));
    }
}
