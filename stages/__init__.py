"""What the work is: models, synthesis (stage 1) and distillation (stage 2). The two stages never import each other."""
