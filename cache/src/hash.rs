//! Hashing one open file, with all cores when it is large. Which files need hashing is decided elsewhere.
//!
//! Large files are not memory-mapped: a mapped file that somebody truncates kills the process with SIGBUS. Instead
//! every core reads pieces that fit its cache and hashes them as subtrees of the BLAKE3 tree, which measures as
//! fast as mapping (`cargo run --release -p grlm-cache --example hash_speed`).

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use crate::digest::Digest;

/// Bytes read and hashed at once by one core. A power of two times BLAKE3's chunk, so that pieces are whole subtrees.
const PIECE: u64 = 512 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The digest of the first `size` bytes of `file`; a file that is shorter by now gives `UnexpectedEof`.
pub(crate) fn hash_file(file: &File, size: u64) -> io::Result<Digest> {
    if size <= PIECE {
        return with_piece(file, 0, size, Digest::of);
    }
    let left = left_subtree_len(size);
    let (left_value, right_value) = rayon::join(|| subtree(file, 0, left), || subtree(file, left, size - left));
    Ok(merge_subtrees_root(&left_value?, &right_value?, Mode::Hash).into())
}

/// The chaining value of a subtree that is not the root.
fn subtree(file: &File, offset: u64, length: u64) -> io::Result<ChainingValue> {
    if length <= PIECE {
        return with_piece(file, offset, length, |bytes| {
            Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
        });
    }
    let left = left_subtree_len(length);
    let (left_value, right_value) =
        rayon::join(|| subtree(file, offset, left), || subtree(file, offset + left, length - left));
    Ok(merge_subtrees_non_root(&left_value?, &right_value?, Mode::Hash))
}

fn with_piece<T>(file: &File, offset: u64, length: u64, use_bytes: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(bytes, offset)?;
        Ok(use_bytes(bytes))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn equals_blake3_at_sizes_around_the_pieces() {
        let piece = usize::try_from(PIECE).unwrap();
        let bytes: Vec<u8> = (0..5 * piece + 77).map(|i| (i * 31 % 251) as u8).collect();
        for size in
            [0, 1, 1023, 1025, piece - 1, piece, piece + 1, 2 * piece, 2 * piece + 1, 3 * piece + 1024, bytes.len()]
        {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes[..size]).unwrap();
            assert_eq!(hash_file(&file, size as u64).unwrap(), Digest::of(&bytes[..size]), "{size} bytes");
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_not_a_crash() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * PIECE).unwrap();
        assert_eq!(hash_file(&file, 4 * PIECE).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
