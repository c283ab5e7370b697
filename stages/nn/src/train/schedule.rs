//! The learning rate of each step: a linear warm-up, then a cosine or a line down to a share of the peak.

/// The shape after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    Cosine,
    Linear,
    Constant,
}

/// A learning-rate schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub peak: f64,
    pub decay: Decay,
    pub warmup_steps: u64,
    pub total_steps: u64,
    /// The last step's share of the peak.
    pub floor: f64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / rest).min(1.0);
        let share = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => 1.0,
        };
        self.peak * (self.floor + (1.0 - self.floor) * share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_then_falls() {
        let schedule = Schedule { peak: 2.0, decay: Decay::Cosine, warmup_steps: 4, total_steps: 24, floor: 0.1 };
        assert_eq!(schedule.at(0), 0.5);
        assert_eq!(schedule.at(3), 2.0);
        assert_eq!(schedule.at(4), 2.0);
        assert!((schedule.at(14) - (0.2 + 1.8 * 0.5)).abs() < 1e-12);
        assert!((schedule.at(24) - 0.2).abs() < 1e-12);
        let linear = Schedule { decay: Decay::Linear, ..schedule };
        assert!((linear.at(9) - (0.2 + 1.8 * 0.75)).abs() < 1e-12);
    }
}
