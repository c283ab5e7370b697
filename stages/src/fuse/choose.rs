//! The search for rule, depth and weights: every combination on a grid, by one figure on the validation item.
//!
//! Only users whose target is in some list can tell combinations apart, and of them only the candidates' contributions
//! matter; so a grid of thousands of points is a matter of seconds. The first of equally good combinations wins, in
//! the order of the parameters, equal weights before unequal ones.

use rayon::prelude::*;

use super::{
    Objective,
    combine::{Candidates, Rule},
    lists::Table,
};

/// Points of a grid of weights at most; with more models the grid is coarser.
const POINTS: usize = 2000;
/// Steps from 0 to 1 that a grid may have.
const STEPS: [usize; 6] = [40, 20, 10, 5, 4, 2];

/// What may be chosen, and by what.
#[derive(Debug)]
pub struct Search {
    pub rules: Vec<Rule>,
    pub depths: Vec<usize>,
    /// Weights that are not to be chosen, one a model.
    pub weights: Option<Vec<f64>>,
    pub objective: Objective,
    pub k: u32,
}

/// The best combination.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub rule: Rule,
    pub depth: usize,
    /// One a model, in sum 1 (or as they were given).
    pub weights: Vec<f64>,
    /// The figure on validation; `None` where there are no validation rankings.
    pub value: Option<f64>,
    /// Number of combinations looked at.
    pub tried: usize,
}

impl Search {
    /// Looks at every combination. Rules and depths must not be empty.
    pub fn run(&self, valid: &Table, models: usize) -> Chosen {
        let grid = match &self.weights {
            Some(weights) => vec![weights.clone()],
            None => grid(models),
        };
        let mut best: Option<Chosen> = None;
        let mut tried = 0;
        for &rule in &self.rules {
            for &depth in &self.depths {
                for (weights, value) in grid.iter().zip(self.values(valid, rule, depth, &grid)) {
                    tried += 1;
                    if best.as_ref().is_none_or(|b| b.value < Some(value)) {
                        best = Some(Chosen { rule, depth, weights: weights.clone(), value: Some(value), tried });
                    }
                }
            }
        }
        let mut best = best.unwrap_or_else(|| Chosen {
            rule: Rule::MinMax,
            depth: 1,
            weights: grid[0].clone(),
            value: None,
            tried,
        });
        best.tried = tried;
        best.value = best.value.filter(|_| valid.users() > 0);
        best
    }

    /// One model's own figure, its whole lists taken.
    pub fn alone(&self, valid: &Table, model: usize) -> f64 {
        let gain = |user: usize| {
            let place = valid.lists(user)[model].items.iter().position(|item| *item == valid.target(user));
            place.map_or(0.0, |place| self.gain(place as u32 + 1))
        };
        (0..valid.users()).map(gain).sum::<f64>() / valid.users().max(1) as f64
    }

    fn gain(&self, rank: u32) -> f64 {
        match self.objective {
            _ if rank > self.k => 0.0,
            Objective::Recall => 1.0,
            Objective::Ndcg => 1.0 / f64::from(rank + 1).log2(),
        }
    }

    /// The figure for every weighting of `grid`.
    fn values(&self, valid: &Table, rule: Rule, depth: usize, grid: &[Vec<f64>]) -> Vec<f64> {
        let found: Vec<(Candidates, usize)> = (0..valid.users())
            .into_par_iter()
            .filter_map(|user| {
                let candidates = Candidates::new(valid.lists(user), rule, depth);
                let place = candidates.items.iter().position(|item| *item == valid.target(user))?;
                Some((candidates, place))
            })
            .collect();
        let value = |weights: &Vec<f64>| {
            let gains = found.iter().map(|(candidates, place)| self.gain(candidates.rank(*place, weights)));
            gains.sum::<f64>() / valid.users().max(1) as f64
        };
        grid.par_iter().map(value).collect()
    }
}

/// All weights in sum 1 on the finest grid of at most [`POINTS`] points, the most even ones first.
fn grid(models: usize) -> Vec<Vec<f64>> {
    let steps = STEPS.into_iter().find(|&steps| compositions(steps, models) <= POINTS).unwrap_or(1);
    let mut points = Vec::new();
    let mut point = vec![0; models];
    fill(&mut point, 0, steps, &mut points);
    // Stable: among equally even ones, those that favour later models come first, whatever that is worth.
    points.sort_by_key(|point: &Vec<usize>| point.iter().map(|c| c * c).sum::<usize>());
    points.into_iter().map(|point| point.into_iter().map(|c| c as f64 / steps as f64).collect()).collect()
}

/// Ways to write `steps` as a sum of `models` numbers from 0: C(steps + models − 1, models − 1).
fn compositions(steps: usize, models: usize) -> usize {
    (1..models).try_fold(1usize, |ways, i| ways.checked_mul(steps + i).map(|w| w / i)).unwrap_or(usize::MAX)
}

fn fill(point: &mut [usize], model: usize, left: usize, points: &mut Vec<Vec<usize>>) {
    if model + 1 == point.len() {
        point[model] = left;
        points.push(point.to_vec());
        return;
    }
    for count in 0..=left {
        point[model] = count;
        fill(point, model + 1, left - count, points);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_hold_every_corner_and_stay_small() {
        for models in 2..=9 {
            let grid = grid(models);
            assert!(
                grid.len() <= POINTS
                    && grid.len()
                        == grid.iter().map(|w| format!("{w:?}")).collect::<std::collections::BTreeSet<_>>().len()
            );
            assert!(grid.iter().all(|w| (w.iter().sum::<f64>() - 1.0).abs() < 1e-9));
            for model in 0..models {
                assert!(grid.iter().any(|w| w[model] == 1.0), "model {model} of {models} alone");
            }
        }
        assert_eq!(grid(2)[0], [0.5, 0.5], "equal weights first");
    }
}
