//! The innermost loop of products: a tile of a few rows by one or several panels of 16 columns, held in registers, one
//! fused multiply-add chain per element.
//!
//! Rows are read where they lie, an element of each at a time; only the matrix is packed. While a tile is computed, a
//! part of the memory that comes next is asked for: panels stream through the caches, and waiting for them would cost
//! more than anything else here.

use super::{
    isa::{Isa, isa},
    panels::WIDTH,
};

/// Rows of the largest tile of any instruction set.
pub const MAX_ROWS: usize = 12;

/// Inner indices for which one cache line is asked for.
pub const INNER_PER_LINE: usize = 4;

/// Rows of the largest tile whose sums all stay in this processor's registers.
pub fn rows_at_once() -> usize {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => 12,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => 6,
        Isa::Portable => 6,
    }
}

/// Panels that a tile of this many rows takes at once: few sums alone would leave the multipliers waiting.
pub fn panels_at_once(rows: usize) -> usize {
    match (isa(), rows) {
        (_, 1) => 4,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, _) => 2,
        (_, 2 | 3) => 2,
        _ => 1,
    }
}

/// One tile of a product.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Inner length.
    pub inner: usize,
    /// The first row's first element.
    pub a: *const f32,
    /// Floats from one row to the next.
    pub a_stride: usize,
    /// The first panel, `[inner, 16]`, on a cache line.
    pub b: *const f32,
    /// Floats from one panel to the next.
    pub b_stride: usize,
    /// The tile's first element in the result.
    pub c: *mut f32,
    /// Floats from one row of the result to the next.
    pub c_stride: usize,
    /// Go on from what the result holds, instead of from 0.
    pub accumulate: bool,
    /// Memory that will be read soon: `inner / 4` cache lines are asked for. Need not exist.
    pub ahead: *const f32,
}

pub type Kernel = unsafe fn(Tile);

/// The kernel for tiles of `rows` rows and `panels` panels.
///
/// # Panics
/// On a tile that does not exist: a defect of the caller.
pub fn kernel(rows: usize, panels: usize) -> Kernel {
    macro_rules! table {
        ($module:ident: $(($rows:literal, $panels:literal))*) => {
            match (rows, panels) {
                $(($rows, $panels) => $module::tile::<$rows, $panels>,)*
                _ => unreachable!("no kernel for {rows} rows by {panels} panels"),
            }
        };
    }
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => table!(avx512:
            (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1) (9, 1) (10, 1) (11, 1) (12, 1)
            (1, 4) (2, 2) (3, 2) (4, 2) (5, 2) (6, 2) (7, 2) (8, 2) (9, 2) (10, 2) (11, 2) (12, 2)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => table!(avx2: (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (1, 4) (2, 2) (3, 2)),
        Isa::Portable => table!(portable: (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (1, 4) (2, 2) (3, 2)),
    }
}

/// The kernel in terms of one instruction set's vectors of `LANES` floats.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_kernel {
    ($module:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        mod $module {
            use std::arch::x86_64::*;

            use super::{INNER_PER_LINE, Tile, WIDTH};

            const VECTORS: usize = WIDTH / $lanes;

            /// # Safety
            /// The processor has the features; the tile's pointers are valid for the sizes it states.
            #[target_feature(enable = $features)]
            pub unsafe fn tile<const ROWS: usize, const PANELS: usize>(t: Tile) {
                let mut acc = [[[$zero(); VECTORS]; PANELS]; ROWS];
                // SAFETY: every address that is read or written is inside the tile that the caller vouches for;
                // asking for memory ahead never faults.
                unsafe {
                    if t.accumulate {
                        for (row, acc) in acc.iter_mut().enumerate() {
                            for (panel, acc) in acc.iter_mut().enumerate() {
                                for (v, acc) in acc.iter_mut().enumerate() {
                                    *acc = $load(t.c.add(row * t.c_stride + panel * WIDTH + v * $lanes));
                                }
                            }
                        }
                    }
                    let (mut a, mut b, mut ahead) = (t.a, t.b, t.ahead.cast::<i8>());
                    macro_rules! link {
                        ($k:expr) => {
                            for panel in 0..PANELS {
                                let mut columns = [$zero(); VECTORS];
                                for (v, column) in columns.iter_mut().enumerate() {
                                    *column = $load(b.add(panel * t.b_stride + $k * WIDTH + v * $lanes));
                                }
                                for row in 0..ROWS {
                                    let x = $splat(*a.add(row * t.a_stride + $k));
                                    for v in 0..VECTORS {
                                        acc[row][panel][v] = $fma(x, columns[v], acc[row][panel][v]);
                                    }
                                }
                            }
                        };
                    }
                    for _ in 0..t.inner / INNER_PER_LINE {
                        _mm_prefetch(ahead, _MM_HINT_T0);
                        ahead = ahead.wrapping_add(64);
                        link!(0);
                        link!(1);
                        link!(2);
                        link!(3);
                        a = a.add(INNER_PER_LINE);
                        b = b.add(INNER_PER_LINE * WIDTH);
                    }
                    for _ in 0..t.inner % INNER_PER_LINE {
                        link!(0);
                        a = a.add(1);
                        b = b.add(WIDTH);
                    }
                    for (row, acc) in acc.iter().enumerate() {
                        for (panel, acc) in acc.iter().enumerate() {
                            for (v, acc) in acc.iter().enumerate() {
                                $store(t.c.add(row * t.c_stride + panel * WIDTH + v * $lanes), *acc);
                            }
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector_kernel!(
    avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps
);
#[cfg(target_arch = "x86_64")]
vector_kernel!(
    avx2,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps
);

/// For every other processor; `mul_add` is one instruction on those worth having (NEON, SVE).
mod portable {
    use super::{Tile, WIDTH};

    /// # Safety
    /// The tile's pointers are valid for the sizes it states.
    pub unsafe fn tile<const ROWS: usize, const PANELS: usize>(t: Tile) {
        for row in 0..ROWS {
            for panel in 0..PANELS {
                let mut acc = [0.0f32; WIDTH];
                // SAFETY: every address is inside the tile that the caller vouches for.
                unsafe {
                    let c = t.c.add(row * t.c_stride + panel * WIDTH);
                    if t.accumulate {
                        std::ptr::copy_nonoverlapping(c, acc.as_mut_ptr(), WIDTH);
                    }
                    for k in 0..t.inner {
                        let x = *t.a.add(row * t.a_stride + k);
                        let b = t.b.add(panel * t.b_stride + k * WIDTH);
                        for (lane, acc) in acc.iter_mut().enumerate() {
                            *acc = x.mul_add(*b.add(lane), *acc);
                        }
                    }
                    std::ptr::copy_nonoverlapping(acc.as_ptr(), c, WIDTH);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tile over rows of `inner + 3` floats.
    fn run(tile: Kernel, rows: usize, panels: usize, inner: usize, accumulate: bool) -> Vec<f32> {
        let noise = |i: usize| ((i as f32 * 12.9898).sin() * 43758.547).fract();
        let a_stride = inner + 3;
        let a: Vec<f32> = (0..rows * a_stride).map(noise).collect();
        let b: Vec<f32> = (0..inner * panels * WIDTH).map(|i| noise(i + 991)).collect();
        let c_stride = panels * WIDTH;
        let mut c: Vec<f32> = (0..rows * c_stride).map(|i| i as f32 * 0.01).collect();
        let t = Tile {
            inner,
            a: a.as_ptr(),
            a_stride,
            b: b.as_ptr(),
            b_stride: inner * WIDTH,
            c: c.as_mut_ptr(),
            c_stride,
            accumulate,
            ahead: std::ptr::null(),
        };
        // SAFETY: `a` is `[rows, inner + 3]`, `b` is `[panels, inner, 16]`, `c` is `[rows, panels × 16]`.
        unsafe { tile(t) };
        c
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_portable_kernel() {
        for inner in [1, 7, 40] {
            for accumulate in [false, true] {
                macro_rules! check {
                    ($(($rows:literal, $panels:literal))*) => {$(
                        let wanted = run(portable::tile::<$rows, $panels>, $rows, $panels, inner, accumulate);
                        #[cfg(target_arch = "x86_64")]
                        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                            assert_eq!(run(avx2::tile::<$rows, $panels>, $rows, $panels, inner, accumulate), wanted);
                        }
                        #[cfg(target_arch = "x86_64")]
                        if is_x86_feature_detected!("avx512f") {
                            assert_eq!(run(avx512::tile::<$rows, $panels>, $rows, $panels, inner, accumulate), wanted);
                        }
                        assert!(!wanted.is_empty());
                    )*};
                }
                check!((1, 1)(2, 1)(3, 1)(4, 1)(5, 1)(6, 1)(7, 1)(9, 1)(12, 1));
                check!((1, 4)(2, 2)(3, 2)(4, 2)(8, 2)(11, 2)(12, 2));
            }
        }
    }

    #[test]
    fn there_is_a_kernel_for_every_tile_that_is_asked_for() {
        for rows in 1..=rows_at_once() {
            assert_eq!(run(kernel(rows, panels_at_once(rows)), rows, panels_at_once(rows), 5, false).len() % WIDTH, 0);
            assert_eq!(run(kernel(rows, 1), rows, 1, 5, true).len(), rows * WIDTH);
        }
    }
}
