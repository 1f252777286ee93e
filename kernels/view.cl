// view.cl - how training looks at a stored image: a row of the table that dpresnet/augment.py draws, one per image of a batch.
// A rectangle holds rows top to top + height and columns left to left + width; 0 pixels where there is none.

typedef struct {
    int crop_top, crop_left, crop_height, crop_width;          // of the stored image; beyond its border all is black
    int flip;
    float brightness, contrast, saturation;                    // factors
    float grey;                                                // mean luma of the stored image
    int erased_top, erased_left, erased_height, erased_width;  // holes in the view
    int cutout_top, cutout_left, cutout_height, cutout_width;
    int pasted_top, pasted_left, pasted_height, pasted_width;  // of the view, taken from the partner; none: all are blended
    int partner;                                               // index in this batch
    float share;                                               // of this image, 1 without a partner
} View;
