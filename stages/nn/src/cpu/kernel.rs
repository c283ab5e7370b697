//! The innermost loop of products: a tile of up to 12 rows by 32 (or, for 1 and 2 rows, 128) columns held in
//! registers, one fused multiply-add chain per element.

use super::{
    isa::{Isa, isa},
    panels::WIDTH,
};

/// Rows of the largest tile.
pub const MAX_ROWS: usize = 12;

/// Panels that a tile of this many rows takes at once: few rows alone would leave the multipliers waiting.
pub const fn panels_at_once(rows: usize) -> usize {
    if rows <= 2 { 4 } else { 1 }
}

/// One tile of a product.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Inner length.
    pub inner: usize,
    /// Packed rows, `[inner, rows]`.
    pub a: *const f32,
    /// The first panel, `[inner, 32]`.
    pub b: *const f32,
    /// Floats from one panel to the next.
    pub b_stride: usize,
    /// The tile's first element in the result.
    pub c: *mut f32,
    /// Floats from one row of the result to the next.
    pub c_stride: usize,
    /// Go on from what the result holds, instead of from 0.
    pub accumulate: bool,
}

type Kernel = unsafe fn(Tile);

/// The kernel for tiles of `rows` rows and `panels` panels.
///
/// # Panics
/// On a tile that does not exist: a defect of the caller.
pub fn kernel(rows: usize, panels: usize) -> Kernel {
    macro_rules! table {
        ($module:ident) => {
            match (rows, panels) {
                (1, 1) => $module::tile::<1, 1>,
                (1, 4) => $module::tile::<1, 4>,
                (2, 1) => $module::tile::<2, 1>,
                (2, 4) => $module::tile::<2, 4>,
                (3, 1) => $module::tile::<3, 1>,
                (4, 1) => $module::tile::<4, 1>,
                (5, 1) => $module::tile::<5, 1>,
                (6, 1) => $module::tile::<6, 1>,
                (7, 1) => $module::tile::<7, 1>,
                (8, 1) => $module::tile::<8, 1>,
                (9, 1) => $module::tile::<9, 1>,
                (10, 1) => $module::tile::<10, 1>,
                (11, 1) => $module::tile::<11, 1>,
                (12, 1) => $module::tile::<12, 1>,
                _ => unreachable!("no kernel for {rows} rows by {panels} panels"),
            }
        };
    }
    match isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => table!(avx512),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => table!(avx2),
        Isa::Portable => table!(portable),
    }
}

/// The kernel in terms of one instruction set's vectors of `LANES` floats: a part of a tile whose sums all stay in
/// registers. How a tile is cut into such parts is the instruction set's own `tile`.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_kernel {
    ($module:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        mod $module {
            use std::arch::x86_64::*;

            const VECTORS: usize = super::WIDTH / $lanes;

            /// `R` rows from `row` on by `V` vectors from `vector` on, in each of `P` panels from `panel` on, of a
            /// tile of `ROWS` rows.
            ///
            /// # Safety
            /// The processor has the features; the tile's pointers are valid for the sizes it states.
            #[target_feature(enable = $features)]
            unsafe fn part<const ROWS: usize, const R: usize, const V: usize, const P: usize>(
                t: super::Tile,
                row: usize,
                panel: usize,
                vector: usize,
            ) {
                // SAFETY: every address is inside the tile that the caller vouches for.
                unsafe {
                    let c = t.c.add(row * t.c_stride + panel * super::WIDTH + vector * $lanes);
                    let mut acc = [[[$zero(); V]; P]; R];
                    if t.accumulate {
                        for (row, acc) in acc.iter_mut().enumerate() {
                            for (panel, acc) in acc.iter_mut().enumerate() {
                                for (v, acc) in acc.iter_mut().enumerate() {
                                    *acc = $load(c.add(row * t.c_stride + panel * super::WIDTH + v * $lanes));
                                }
                            }
                        }
                    }
                    let mut a = t.a.add(row);
                    let mut b = t.b.add(panel * t.b_stride + vector * $lanes);
                    for _ in 0..t.inner {
                        for panel in 0..P {
                            let mut columns = [$zero(); V];
                            for (v, column) in columns.iter_mut().enumerate() {
                                *column = $load(b.add(panel * t.b_stride + v * $lanes));
                            }
                            for row in 0..R {
                                let x = $splat(*a.add(row));
                                for v in 0..V {
                                    acc[row][panel][v] = $fma(x, columns[v], acc[row][panel][v]);
                                }
                            }
                        }
                        a = a.add(ROWS);
                        b = b.add(super::WIDTH);
                    }
                    for (row, acc) in acc.iter().enumerate() {
                        for (panel, acc) in acc.iter().enumerate() {
                            for (v, acc) in acc.iter().enumerate() {
                                $store(c.add(row * t.c_stride + panel * super::WIDTH + v * $lanes), *acc);
                            }
                        }
                    }
                }
            }

            /// # Safety
            /// The processor has the features; the tile's pointers are valid for the sizes it states.
            #[target_feature(enable = $features)]
            pub unsafe fn tile<const ROWS: usize, const PANELS: usize>(t: super::Tile) {
                // SAFETY: the parts that tiles are cut into lie inside them.
                unsafe { super::cut::$module!(t, ROWS, PANELS) }
            }
        }
    };
}

/// How each instruction set cuts a tile into parts.
#[cfg(target_arch = "x86_64")]
mod cut {
    /// 32 registers hold the sums of the largest tile.
    macro_rules! avx512 {
        ($t:ident, $rows:ident, $panels:ident) => {
            part::<$rows, $rows, VECTORS, $panels>($t, 0, 0, 0)
        };
    }

    /// 16 registers hold 12 sums beside a row's element and the columns; fewer than 8 sums would leave the
    /// multipliers waiting for each other.
    macro_rules! avx2 {
        ($t:ident, $rows:ident, $panels:ident) => {{
            if $rows == 1 && $panels > 1 {
                for panel in (0..$panels).step_by(2) {
                    part::<$rows, 1, VECTORS, 2>($t, 0, panel, 0);
                }
                return;
            }
            for panel in 0..$panels {
                match $rows {
                    1 => part::<$rows, 1, VECTORS, 1>($t, 0, panel, 0),
                    2 => part::<$rows, 2, VECTORS, 1>($t, 0, panel, 0),
                    3 => part::<$rows, 3, VECTORS, 1>($t, 0, panel, 0),
                    _ => {}
                }
                if $rows <= 3 {
                    continue;
                }
                for vector in (0..VECTORS).step_by(2) {
                    let first = if $rows <= 6 { $rows } else { $rows.div_ceil(2) };
                    for (row, height) in [(0, first), (first, $rows - first)] {
                        match height {
                            0 => {}
                            3 => part::<$rows, 3, 2, 1>($t, row, panel, vector),
                            4 => part::<$rows, 4, 2, 1>($t, row, panel, vector),
                            5 => part::<$rows, 5, 2, 1>($t, row, panel, vector),
                            _ => part::<$rows, 6, 2, 1>($t, row, panel, vector),
                        }
                    }
                }
            }
        }};
    }
    pub(super) use {avx2, avx512};
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
                        let x = *t.a.add(k * ROWS + row);
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

    fn run(tile: Kernel, rows: usize, panels: usize, a: &[f32], b: &[f32], accumulate: bool) -> Vec<f32> {
        let inner = a.len() / rows;
        let c_stride = panels * WIDTH;
        let mut c: Vec<f32> = (0..rows * c_stride).map(|i| i as f32 * 0.01).collect();
        let b_stride = inner * WIDTH;
        // SAFETY: `a` is `[inner, rows]`, `b` is `[panels, inner, 32]`, `c` is `[rows, panels × 32]`.
        unsafe {
            tile(Tile { inner, a: a.as_ptr(), b: b.as_ptr(), b_stride, c: c.as_mut_ptr(), c_stride, accumulate });
        }
        c
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_portable_kernel() {
        let noise = |i: usize| ((i as f32 * 12.9898).sin() * 43758.547).fract();
        for inner in [1, 7, 40] {
            for accumulate in [false, true] {
                macro_rules! check {
                    ($rows:literal, $panels:literal) => {
                        let a: Vec<f32> = (0..inner * $rows).map(noise).collect();
                        let b: Vec<f32> = (0..inner * $panels * WIDTH).map(|i| noise(i + 991)).collect();
                        let wanted = run(portable::tile::<$rows, $panels>, $rows, $panels, &a, &b, accumulate);
                        assert_eq!(run(kernel($rows, $panels), $rows, $panels, &a, &b, accumulate), wanted);
                        #[cfg(target_arch = "x86_64")]
                        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                            assert_eq!(run(avx2::tile::<$rows, $panels>, $rows, $panels, &a, &b, accumulate), wanted);
                        }
                    };
                }
                check!(1, 1);
                check!(1, 4);
                check!(2, 1);
                check!(2, 4);
                check!(3, 1);
                check!(4, 1);
                check!(5, 1);
                check!(6, 1);
                check!(7, 1);
                check!(8, 1);
                check!(9, 1);
                check!(10, 1);
                check!(11, 1);
                check!(12, 1);
            }
        }
    }
}
