//! Torture: one fault after another on one store, each followed by a plain run that must put everything right.
//!
//! `GRLM_TORTURE_FAULTS` and `GRLM_TORTURE_SEED` choose how many and which (one that did not strike, because the run was
//! over before, is checked like the others and not counted); `scripts/torture` sets them. The same seed
//! gives the same faults, though not the same moments: where a process is when a signal comes is the machine's choice.
//!
//! | file | owns |
//! |---|---|
//! | `world` | the store, the pipeline of short stages, what its results must be, the checks |
//! | `fault` | the kinds of faults, and how each is done |
//! | `power` | what a power cut leaves of a store |

mod fault;
mod power;
mod world;

use std::{collections::BTreeMap, env, time::Instant};

use fault::Fault;
use world::World;

/// SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014).
pub struct Dice(u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides.max(1) as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.roll(from.len()))
    }
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn whatever_happens_the_next_run_puts_it_right() {
    let (faults, seed) = (number("GRLM_TORTURE_FAULTS", 18), number("GRLM_TORTURE_SEED", 1));
    let mut dice = Dice(seed);
    let mut world = World::new();
    let started = Instant::now();
    // How many of each kind struck, of how many.
    let mut kinds: BTreeMap<&'static str, (u32, u32)> = BTreeMap::new();
    let mut done = 0;
    for round in 0.. {
        if done == faults {
            break;
        }
        assert!(round < 3 * faults + 9, "most faults never struck: {kinds:?}");
        // Each kind in its turn, so that a short run has all of them.
        let fault = Fault::choose(round as usize, &mut dice);
        let told = format!("seed {seed}, fault {round}: {fault:?}");
        if env::var_os("GRLM_TORTURE_FAULTS").is_some() {
            eprintln!("{:7.1} s  {told}", started.elapsed().as_secs_f64());
        }
        world.turn(round);
        let (blame, struck) = fault.strike(&mut world, &mut dice);
        let count = kinds.entry(fault.name()).or_default();
        (count.0, count.1) = (count.0 + u32::from(struck), count.1 + 1);
        done += u64::from(struck);
        world.check(&told, blame);
    }
    world.check_all(&format!("seed {seed}, at the end"));
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{faults} faults in {seconds:.0} s, nothing lost, nothing wrong");
    kinds.iter().for_each(|(kind, (struck, of))| eprintln!("  {kind}: {struck} struck of {of}"));
}
